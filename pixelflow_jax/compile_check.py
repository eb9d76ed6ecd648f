"""Compiles a config's train step or sampler for a TPU slice that is not there: does it fit, how fast?

    python -m pixelflow_jax.compile_check --config=configs/imagenet256_xl.py --topology=v5e:4x4
    python -m pixelflow_jax.compile_check --config=... --topology=v5e:2x2 --task=sample

Needs libtpu, but no TPU: install the extra `aot` into an environment of its own. Prints memory per
device beside what the device has, the collectives of a step, floating-point operations counted from the
trace, and a roofline: the least time that work takes on the chip's published peaks, marked as the
projection it is. Ends with an error, and with advice, if it does not fit.
"""

import importlib.metadata
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pixelflow_jax.common import cli, files
from pixelflow_jax.common.errors import UserError
from pixelflow_jax.common.hardware import CHIPS, DEVICE_KINDS, GIB
from pixelflow_jax.config import build_model, check_batch_size, parse_flags
from pixelflow_jax.distributed import sharding

TASKS = ("train", "sample")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--config", required=True, help="config file")
    parser.add_argument("--topology", required=True, help="TPU slice, such as v5e:4x4 or v4:2x2x2")
    parser.add_argument("--num_slices", type=int, default=1, help="of that topology")
    parser.add_argument("--task", choices=TASKS, default="train", help="what to compile")
    parser.add_argument("--batch_per_chip", type=int, help="images a chip; default: config.batch_size")
    parser.add_argument("--json", help="also write the figures to this file")
    args, config = parse_flags(parser, argv)
    for flag in ("num_slices", "batch_per_chip"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    devices = tpu_devices(args.topology, args.num_slices)
    if args.batch_per_chip is not None:
        config.batch_size = args.batch_per_chip * len(devices)
    figures = {"config": args.config, "topology": args.topology, "num_slices": args.num_slices}
    figures |= measure(config, devices, args.task)
    if args.json:
        files.write_json(args.json, figures)
    print(report(figures))
    if not figures["fits"]:
        memory = figures["memory_per_device"]["peak"], figures["hbm_per_device"]
        raise UserError(advice(config, args.task, *memory))


def tpu_devices(topology: str, num_slices: int = 1) -> list:
    """Descriptions of the devices of a TPU slice. Raises UserError if libtpu is missing or says no."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "compile_check needs libtpu: pip install 'pixelflow_jax[aot]', in a venv of its own"
        ) from None
    jax.config.update("jax_platforms", "cpu")  # chips that may be here are left alone
    options = {"num_slices": num_slices} if num_slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores as one device, as JAX runs them
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # libtpu's own kinds
        reason = str(error).strip().splitlines()[0]
        if "lockfile" in reason:
            raise UserError("another process on this machine uses libtpu; wait until it ends") from None
        raise UserError(f"--topology={topology}: {reason}; write it as v5e:4x4") from None
    kind = found.devices[0].device_kind
    if kind not in DEVICE_KINDS:
        raise UserError(f"--topology={topology}: {kind} is not known here; {', '.join(CHIPS)} are")
    return list(found.devices)


def train_program(config, devices: list):
    """(the jitted train step, its abstract arguments, its mesh, FLOPs of the model in a step)."""
    from pixelflow_jax.training.loop import workload
    from pixelflow_jax.training.optimizer import build_optimizer
    from pixelflow_jax.training.step import abstract_batch, abstract_state, make_train_step

    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices, config.mesh.context)
    check_batch_size(config, sharding.batch_shards(mesh))
    model, optimizer = build_model(config), build_optimizer(config)
    arguments = abstract_state(config, model, optimizer, mesh), abstract_batch(config, mesh)
    step = make_train_step(config, model, optimizer, mesh)
    return step, arguments, mesh, workload(config, mesh).flops


def sample_program(config, devices: list):
    """The same of the sampler, as `sample` runs it: every chip holds the parameters."""
    from pixelflow_jax.models.conditioning import init_params
    from pixelflow_jax.sampling.generate import build_sampler, image_mesh, make_generate
    from pixelflow_jax.sampling.solvers import evaluations_per_step
    from pixelflow_jax.training.step import abstract_condition

    sampler, mesh = build_sampler(config), image_mesh(devices, config.mesh.context)
    if sampler.control != "fixed":
        raise UserError(
            f"the steps of {sampler.solver} depend on the images, and so does their cost: add "
            f"--config.sample.step_control=fixed"
        )
    size = config.batch_size
    if size % mesh.shape["images"]:
        raise UserError(f"{size} images do not split over {mesh.shape['images']} groups of chips")
    placed, whole = (NamedSharding(mesh, spec) for spec in (P("images"), P()))

    def shaped(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    shapes = jax.eval_shape(lambda: init_params(sampler.model, 0))
    params = jax.tree.map(lambda x: shaped(x, whole), shapes)
    index = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=placed)
    condition = jax.tree.map(lambda x: shaped(x, placed), abstract_condition(config, size))
    steps = np.array(sampler.grid.steps(sampler.cascade.num_stages))
    one = sampler.stage_flops(config.text.max_length)
    flops = float(steps * evaluations_per_step(sampler.solver) @ one) * size
    arguments = params, {"index": index}, condition, condition
    return make_generate(sampler, mesh=mesh), arguments, mesh, flops


def compile_step(config, devices: list):
    """The compiled train step, its abstract state, its mesh, and the seconds to trace and compile it.

    `devices` may be real ones or descriptions of some that are not here.
    """
    step, arguments, mesh, _ = train_program(config, devices)
    _, compiled, seconds = _compile(config, "train", step, arguments, devices)
    return compiled, arguments[0], mesh, seconds


def _compile(config, task: str, program, arguments, devices: list):
    """(traced, compiled, (seconds to trace, seconds to compile))."""
    begin = time.perf_counter()
    traced = program.trace(*arguments)
    lowered = traced.lower(lowering_platforms=(devices[0].platform,))
    middle = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        memory = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm", text) or re.search(
            r"\(([\d.]+)([GM])\) exceeds available HBM \(([\d.]+)([GM])\)", text
        )
        if not memory:
            raise UserError(
                f"it does not compile for {devices[0].device_kind}: {text.splitlines()[0]}"
            ) from None
        used, has = (
            float(n) * (GIB if unit == "G" else 2**20)
            for n, unit in zip(memory.groups()[::2], memory.groups()[1::2], strict=True)
        )
        raise UserError(advice(config, task, used, has)) from None
    return traced, compiled, (middle - begin, time.perf_counter() - middle)


def advice(config, task: str, used: float, has: float) -> str:
    """What to do about a program that needs more memory than a device has."""
    train, ways = task == "train", []
    if train and config.model.remat != "full":
        ways.append("--config.model.remat=full recomputes activations in the backward pass")
    if not train:
        ways.append("a smaller --batch_per_chip")
    elif config.accumulation_steps * config.cascade.num_stages < config.batch_size:
        ways.append("a larger --config.accumulation_steps, or a smaller batch, holds fewer at a time")
    if train and config.mesh.fsdp != -1:
        ways.append("--config.mesh.fsdp=-1 splits parameters, moments and averages over all chips")
    if config.data.resolution >= 512:
        ways.append("--config.mesh.context=N lets N chips share each image's tokens")
    ways.append("more chips, or chips with more memory")
    return (
        f"it does not fit: {used / GIB:.2f} GiB of {has / GIB:.2f} GiB a device. Ways out: "
        + "; ".join(ways)
    )


def memory_per_device(compiled) -> dict[str, int]:
    """Bytes of a compiled program on each device; "peak" is what must fit."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "peak": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    }


def measure(config, devices: list, task: str = "train") -> dict[str, Any]:
    """Compiles the real program for a TPU slice and collects its figures (see `report`)."""
    import jax

    from pixelflow_jax.aot import hlo, roofline
    from pixelflow_jax.config import DTYPES
    from pixelflow_jax.models.flops import program_flops

    build = train_program if task == "train" else sample_program
    program, arguments, mesh, model_flops = build(config, devices)
    traced, compiled, seconds = _compile(config, task, program, arguments, devices)
    text, memory = compiled.as_text(), memory_per_device(compiled)
    chip = CHIPS[DEVICE_KINDS[devices[0].device_kind]]
    found = hlo.collectives(text)
    totals = hlo.summary(found)
    slices = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    traffic = {"hbm": hlo.hbm_bytes(text), **roofline.moved_bytes(found, slices)}
    flops = {"model": model_flops / mesh.size, "traced": program_flops(traced.jaxpr.jaxpr)}
    flops["lanes"] = program_flops(traced.jaxpr.jaxpr, lanes=128)
    projection = roofline.project(chip, mesh.size, model_flops, flops["lanes"], traffic["hbm"], traffic)
    rate = config.batch_size / mesh.size / projection["step_seconds"]
    params = arguments[0].params if task == "train" else arguments[0]
    count = sum(x.size for x in jax.tree.leaves(params))
    whole = sum(x.size for x in jax.tree.leaves(params) if x.sharding.is_fully_replicated)
    moved = count * DTYPES[config.dtype].dtype.itemsize
    reduced = totals["all-reduce"]["bytes"] + totals["reduce-scatter"]["bytes"]
    return {
        "task": task,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "libtpu")},
        "trace_seconds": seconds[0],
        "compile_seconds": seconds[1],
        "memory_per_device": memory,
        "hbm_per_device": chip.hbm_bytes,
        "fits": memory["peak"] <= chip.hbm_bytes,
        "parameters": count,
        "whole_share": whole / count,
        "flops_per_device": flops,
        "bytes_per_device": traffic,
        "projection": {**projection, "images_per_s_per_chip": rate},
        "collectives": totals,
        "gathered_per_parameter_byte": totals["all-gather"]["bytes"] / moved,
        "reduced_per_gradient_byte": reduced / moved,
        "permutes": sorted({one.source for one in found if one.kind == "collective-permute"}),
    }


def report(figures: dict[str, Any]) -> str:
    """The figures for people."""
    memory, flops = figures["memory_per_device"], figures["flops_per_device"]
    guess, versions = figures["projection"], figures["versions"]
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
            f"  {kind:<20} {numbers['ops']:>4} in the program, {numbers['runs']:>6} runs a step, "
            f"{numbers['bytes'] / GIB:.3f} GiB a step"
        )
    lines.append(
        f"gathered {figures['gathered_per_parameter_byte']:.3f} x the parameters' bytes in the compute "
        f"dtype, reduced {figures['reduced_per_gradient_byte']:.3f} x the gradients'"
    )
    lines += [f"  collective-permute from {source}" for source in figures["permutes"]]
    lines.append(
        f"work per device: {flops['model'] / 1e12:.3f} TFLOP by the model's shapes, "
        f"{flops['traced'] / 1e12:.3f} with what is recomputed, {flops['lanes'] / 1e12:.3f} in lanes of "
        f"128; " + ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in figures["bytes_per_device"].items())
    )
    parts = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in guess["seconds"].items())
    lines.append(
        f"projection, not a measurement: {parts}; a step takes {1e3 * guess['step_seconds']:.1f} ms if "
        f"all overlap (bound by {guess['bound']}; MFU {guess['mfu']:.0%}, "
        f"{guess['images_per_s_per_chip']:.2f} images/s a chip), "
        f"{1e3 * guess['step_seconds_one_after_the_other']:.1f} ms one after the other (MFU "
        f"{guess['mfu_one_after_the_other']:.0%})"
    )
    return "\n".join([*lines, *(f"  {line}" for line in guess["assumptions"])])


if __name__ == "__main__":
    cli.run(main)
