"""Compiles the train step of a config for a TPU slice that is not there, and says what it costs.

    python -m pixelflow_jax.compile_check --config=configs/imagenet256_xl.py --topology=v5e:4x4

Needs libtpu, but no TPU: install the extra `aot` into an environment of its own. Prints memory per
device, compile time, and the collectives of a step: how many, how often, how many bytes. Memory is
per device as JAX counts devices: a v4 chip shows two cores as one or two devices.
"""

import importlib.metadata
import os
import sys
import time
from typing import Any

from pixelflow_jax import cli
from pixelflow_jax.config import build_model, check_batch_size, load_config
from pixelflow_jax.errors import UserError

GIB = 2**30


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--config", required=True, help="config file")
    parser.add_argument("--topology", required=True, help="TPU slice, such as v5e:4x4 or v4:2x2x2")
    parser.add_argument("--num_slices", type=int, default=1, help="of that topology")
    parser.add_argument("--json", help="also write the figures to this file")
    argv = sys.argv[1:] if argv is None else argv
    overrides = [arg.removeprefix("--config.") for arg in argv if arg.startswith("--config.")]
    args = parser.parse_args([arg for arg in argv if not arg.startswith("--config.")])
    config = load_config(args.config, overrides)
    figures = measure(config, args.topology, args.num_slices)
    figures["config"] = args.config
    if args.json:
        from pixelflow_jax import files

        files.write_json(args.json, figures)
    print(report(figures))


def tpu_devices(topology: str, num_slices: int = 1) -> list:
    """Descriptions of the devices of a TPU slice. Raises UserError if libtpu is missing or says no."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "compile_check needs libtpu: pip install 'pixelflow_jax[aot]', in a venv of its own"
        ) from None
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # chips that may be here are left alone
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology,
            **({"num_slices": num_slices} if num_slices > 1 else {}),
        )
    except Exception as error:  # libtpu's own kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology={topology}: {reason}; write it as v5e:4x4") from None
    return list(found.devices)


def compile_step(config, devices: list):
    """The compiled train step, its abstract state, its mesh, and the seconds to trace and compile it.

    `devices` may be real ones or descriptions of some that are not here.
    """
    import jax

    from pixelflow_jax import sharding
    from pixelflow_jax.training.optimizer import build_optimizer
    from pixelflow_jax.training.step import abstract_batch, abstract_state, make_train_step

    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    check_batch_size(config, mesh.size)
    model, optimizer = build_model(config), build_optimizer(config)
    state = abstract_state(config, model, optimizer, mesh)
    begin = time.perf_counter()
    lowered = make_train_step(config, model, optimizer, mesh).lower(state, abstract_batch(config, mesh))
    traced = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:  # it does not fit the device's memory, mostly
        raise UserError(
            f"it does not compile for {devices[0].device_kind}: {str(error).splitlines()[0]}"
        ) from None
    return compiled, state, mesh, (traced - begin, time.perf_counter() - traced)


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


def measure(config, topology: str, num_slices: int = 1) -> dict[str, Any]:
    """Compiles the real train step for a TPU slice and collects its figures (see `report`)."""
    devices = tpu_devices(topology, num_slices)
    import jax

    from pixelflow_jax import hlo
    from pixelflow_jax.config import DTYPES

    compiled, state, mesh, (traced, took) = compile_step(config, devices)
    found = hlo.collectives(compiled.as_text())
    count = sum(x.size for x in jax.tree.leaves(state.params))
    item = DTYPES[config.dtype].dtype.itemsize
    totals = hlo.summary(found)
    gathered = totals["all-gather"]["bytes"]
    reduced = totals["all-reduce"]["bytes"] + totals["reduce-scatter"]["bytes"]
    return {
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "libtpu")},
        "trace_seconds": traced,
        "compile_seconds": took,
        "memory_per_device": memory_per_device(compiled),
        "parameters": count,
        "collectives": totals,
        "gathered_bytes": gathered,
        "reduced_bytes": reduced,
        "gathered_per_parameter_byte": gathered / (count * item),
        "reduced_per_gradient_byte": reduced / (count * item),
        "permutes": sorted({one.source for one in found if one.kind == "collective-permute"}),
    }


def report(figures: dict[str, Any]) -> str:
    """The figures for people."""
    memory = figures["memory_per_device"]
    lines = [
        f"{figures['config']} on {figures['topology']}: {figures['devices']} devices, mesh "
        f"{figures['mesh']}, batch {figures['batch_size']}, {figures['parameters']:,} parameters",
        f"compiled in {figures['compile_seconds']:.0f} s (jax {figures['versions']['jax']}, libtpu "
        f"{figures['versions']['libtpu']})",
        "memory per device: "
        + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in memory.items()),
    ]
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
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
