"""Compile a config's train step or sampler for a TPU slice that is not here: does it fit, how fast?

    python -m pixelflow_jax.compile_check --config=configs/imagenet256_xl.py --topology=v5e:4x4
    python -m pixelflow_jax.compile_check --config=... --topology=v5e:2x2 --task=sample

Needs libtpu, but no TPU: install the extra `aot` into a venv of its own. Prints the memory per device,
the collectives per step, the floating-point operations counted from the trace, and a projection: lower
bounds on the step time at the chip's published peaks. Fails, with advice, if the program does not fit.
"""

from typing import Any

import jax

from pixelflow_jax.aot.compiler import measure, too_large, tpu_devices
from pixelflow_jax.common import UserError, cli, files
from pixelflow_jax.common.hardware import GIB
from pixelflow_jax.config import parse_flags
from pixelflow_jax.training.programs import PROGRAMS


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--config", required=True, help="config file")
    parser.add_argument("--topology", required=True, help="TPU slice, such as v5e:4x4 or v4:2x2x2")
    parser.add_argument("--num_slices", type=int, default=1, help="slices (default: %(default)s)")
    parser.add_argument("--task", choices=PROGRAMS, default="train", help="program to compile")
    parser.add_argument("--batch_per_chip", type=int, help="images per chip; default: config.batch_size")
    parser.add_argument("--json", help="also write the figures to this file")
    args, config = parse_flags(parser, argv)
    for flag in ("num_slices", "batch_per_chip"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    devices = tpu_devices(args.topology, args.num_slices)
    if args.batch_per_chip is not None:
        config.batch_size = args.batch_per_chip * len(devices)
    figures = {"config": args.config, "topology": args.topology, "num_slices": args.num_slices}
    figures |= measure(config, PROGRAMS[args.task](config, devices))
    if args.json:
        files.write_json(args.json, figures)
    print(report(figures))
    if not figures["fits"]:
        memory = figures["memory_per_device"]["peak"], figures["hbm_per_device"]
        raise UserError(too_large(config, args.task, *memory))


def report(figures: dict[str, Any]) -> str:
    """Return the figures of `measure` as text."""
    memory, flops = figures["memory_per_device"], figures["flops_per_device"]
    projected, versions = figures["projection"], figures["versions"]
    slices = f"{figures['num_slices']} x " if figures["num_slices"] > 1 else ""
    lines = [
        f"{figures['task']} {figures['config']} on {slices}{figures['topology']}: {figures['devices']} "
        f"devices, mesh {figures['mesh']}, batch {figures['batch_size']}, "
        f"{figures['parameters']:,} parameters",
        f"traced in {figures['trace_seconds']:.0f} s, compiled in {figures['compile_seconds']:.0f} s "
        f"(jax {versions['jax']}, libtpu {versions['libtpu']})",
        "memory per device: "
        + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in memory.items())
        + f", of {figures['hbm_per_device'] / GIB:.0f} GiB",
    ]
    fsdp = figures["mesh"].get("fsdp", 1)
    if fsdp > 1 and figures["whole_share"] > 0.1:
        lines.append(
            f"warning: {figures['whole_share']:.0%} of the parameters are whole on every device, as no "
            f"axis of theirs divides by {fsdp}; a smaller --config.mesh.fsdp, such as 16, splits them"
        )
    for kind, numbers in figures["collectives"].items():
        lines.append(
            f"  {kind:<20} {numbers['ops']:>4} in the program, {numbers['runs']:>6} runs per step, "
            f"{numbers['bytes'] / GIB:.3f} GiB per step"
        )
    lines.append(
        f"gathered {figures['gathered_per_parameter_byte']:.3f} x the parameters' bytes in the compute "
        f"dtype, reduced {figures['reduced_per_gradient_byte']:.3f} x the gradients'"
    )
    lines += [f"  collective-permute from {source}" for source in figures["permutes"]]
    lines.append(
        f"work per device: {flops['model'] / 1e12:.3f} TFLOP by the model's shapes, "
        f"{flops['traced'] / 1e12:.3f} with recomputation, {flops['lanes'] / 1e12:.3f} in lanes of 128; "
        + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in figures["bytes_per_device"].items())
    )
    parts = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in projected["seconds"].items())
    lines.append(
        f"projection, not a measurement: {parts}; lower bounds of a step: "
        f"{1e3 * projected['step_seconds']:.1f} ms if all overlap (bound by {projected['bound']}; MFU "
        f"{projected['mfu']:.0%}, {projected['images_per_s_per_chip']:.2f} images/s per chip), "
        f"{1e3 * projected['step_seconds_one_after_the_other']:.1f} ms one after the other (MFU "
        f"{projected['mfu_one_after_the_other']:.0%})"
    )
    return "\n".join([*lines, *(f"  {line}" for line in projected["assumptions"])])


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is what is asked for, and timed
    cli.run(main)
