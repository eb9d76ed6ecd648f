"""Compile a program for devices that need not be here, and measure what it needs there."""

import importlib.metadata
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pixelflow_jax.aot import hlo, projection
from pixelflow_jax.common import UserError
from pixelflow_jax.common.hardware import CHIPS, DEVICE_KINDS, GIB
from pixelflow_jax.config import DTYPES
from pixelflow_jax.models.flops import program_flops

UNITS = {"G": GIB, "M": 2**20}


class Program(NamedTuple):
    """A jitted function with abstract arguments (see training/programs.py).

    Attributes:
      function: the train step or the sampler.
      arguments: shapes, dtypes and shardings; nothing is allocated.
      mesh: the devices that it runs on.
      flops: floating-point operations of one run by the model's shapes, on all devices together.
      task: "train" or "sample".
    """

    function: Callable
    arguments: tuple
    mesh: Mesh
    flops: float
    task: str


def tpu_devices(topology: str, num_slices: int = 1) -> list:
    """Return descriptions of the devices of `num_slices` TPU slices with a topology such as v5e:4x4.

    Raises UserError if libtpu is missing, is in use, or does not know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "compile_check needs libtpu: pip install 'pixelflow_jax[aot]', in a venv of its own"
        ) from None
    jax.config.update("jax_platforms", "cpu")  # leave the chips of this machine alone
    options = {"num_slices": num_slices} if num_slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores are one device, as JAX runs them
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # libtpu has its own kinds
        reason = str(error).strip().splitlines()[0]
        if "lockfile" in reason:
            raise UserError("another process on this machine uses libtpu; wait until it ends") from None
        raise UserError(f"--topology={topology}: {reason}; write it as v5e:4x4") from None
    kind = found.devices[0].device_kind
    if kind not in DEVICE_KINDS:
        raise UserError(f"--topology={topology}: unknown chip {kind}; choose from {', '.join(CHIPS)}")
    return list(found.devices)


def compile_program(config: ConfigDict, program: Program):
    """Return (traced, compiled, (seconds to trace, seconds to compile)).

    Raises UserError if the program does not compile for its devices; says what would help where memory
    is too small.
    """
    device = program.mesh.devices.flat[0]
    begin = time.perf_counter()
    traced = program.function.trace(*program.arguments)
    lowered = traced.lower(lowering_platforms=(device.platform,))
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
                f"the program does not compile for {device.device_kind}: {text.splitlines()[0]}"
            ) from None
        used, used_unit, limit, limit_unit = memory.groups()
        sizes = float(used) * UNITS[used_unit], float(limit) * UNITS[limit_unit]
        raise UserError(too_large(config, program.task, *sizes)) from None
    return traced, compiled, (middle - begin, time.perf_counter() - middle)


def too_large(config: ConfigDict, task: str, needed: float, available: float) -> str:
    """Return a sentence on a program that needs more bytes per device than there are."""
    sizes = f"{needed / GIB:.2f} GiB of {available / GIB:.2f} GiB per device"
    return f"it does not fit: {sizes}. {advice(config, task)}"


def advice(config: ConfigDict, task: str) -> str:
    """Return what to do about a program that needs too much memory."""
    train, ways = task == "train", []
    if train and config.model.remat in ("none", "dots"):
        ways.append("--config.model.remat=full recomputes activations in the backward pass")
    if train and config.model.remat != "offload":
        ways.append("--config.model.remat=offload also keeps the layers' inputs in the host's memory")
    if not train:
        ways.append("a smaller --batch_per_chip")
    elif config.accumulation_steps * config.cascade.num_stages < config.batch_size:
        ways.append("a larger --config.accumulation_steps, or a smaller batch, holds fewer at a time")
    if train and config.mesh.fsdp != -1:
        ways.append("--config.mesh.fsdp=-1 splits parameters, moments and averages over all chips")
    if config.data.resolution >= 512:
        ways.append("--config.mesh.context=N lets N chips share each image's tokens")
    ways.append("more chips, or chips with more memory")
    return f"Ways out: {'; '.join(ways)}"


def memory_per_device(compiled) -> dict[str, int]:
    """Return a compiled program's bytes on each device; "peak" is what must fit."""
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


def measure(config: ConfigDict, program: Program) -> dict[str, Any]:
    """Compile a program for a TPU slice and return its figures, as compile_check reports them."""
    traced, compiled, seconds = compile_program(config, program)
    mesh, params = program.mesh, program.arguments[0]
    params = params.params if program.task == "train" else params
    memory = memory_per_device(compiled)
    chip = CHIPS[DEVICE_KINDS[mesh.devices.flat[0].device_kind]]
    found = hlo.collectives(compiled.as_text())
    totals = hlo.summary(found)
    slices = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    traffic = projection.moved_bytes(found, slices)
    flops = {"model": program.flops / mesh.size, "traced": program_flops(traced.jaxpr.jaxpr)}
    flops["lanes"] = program_flops(traced.jaxpr.jaxpr, lanes=128)
    projected = projection.project(chip, mesh.size, program.flops, flops["lanes"], traffic)
    rate = config.batch_size / mesh.size / projected["step_seconds"]
    count = sum(x.size for x in jax.tree.leaves(params))
    whole = sum(x.size for x in jax.tree.leaves(params) if x.sharding.is_fully_replicated)
    moved = count * DTYPES[config.dtype].dtype.itemsize
    reduced = totals["all-reduce"]["bytes"] + totals["reduce-scatter"]["bytes"]
    return {
        "task": program.task,
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
        "projection": {**projected, "images_per_s_per_chip": rate},
        "collectives": totals,
        "gathered_per_parameter_byte": totals["all-gather"]["bytes"] / moved,
        "reduced_per_gradient_byte": reduced / moved,
        "permutes": sorted({one.source for one in found if one.kind == "collective-permute"}),
    }
