"""Runs the same training and sampling on meshes of 8 simulated devices; prints one JSON object.

A script of its own, as the number of devices is fixed when JAX starts; test_sharding.py runs it.
"""

import itertools
import json
import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from pixelflow_jax.aot import hlo
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.data.sources import load_source
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import init_params
from pixelflow_jax.sampling.generate import build_sampler, make_generate
from pixelflow_jax.sampling.sampler import class_conditions
from pixelflow_jax.sampling.starts import FromSeed, image_keys
from pixelflow_jax.training.loop import device_batches
from pixelflow_jax.training.optimizer import build_optimizer
from pixelflow_jax.training.step import init_state, make_train_step
from pixelflow_jax.training.teacher import freeze

from conftest import TINY, calm

MESHES = {  # name: (data, fsdp, context, accumulation_steps)
    "one": (1, 1, 1, 1),
    "data": (8, 1, 1, 1),
    "fsdp": (1, 8, 1, 1),
    "mixed": (2, 4, 1, 1),
    "context": (1, 1, 4, 1),
    "all": (2, 2, 2, 1),
    "accumulated": (1, 1, 1, 4),
    "mixed_accumulated": (2, 2, 2, 2),
}
DISTILLED = ("one", "context", "all", "mixed_accumulated")
STEPS = 10


def run(data: int, fsdp: int, context: int, accumulation: int, *overrides: str) -> dict:
    """Losses of 10 steps, and the share of each large array that one device holds."""
    config = load_config(
        "configs/digits.py", [*TINY, "batch_size=32", f"accumulation_steps={accumulation}", *overrides]
    )
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp * context], context)
    model, optimizer = build_model(config), build_optimizer(config)

    def init():
        return init_state(init_params(model, config.seed), optimizer)

    state = jax.jit(init, out_shardings=sharding.shardings(jax.eval_shape(init), mesh))()
    step, losses, frozen = make_train_step(config, model, optimizer, mesh), [], None
    if config.distill.teacher:
        frozen = freeze(config, calm(model.clone(intervals=False)), mesh, lambda batch: batch)
    batches = device_batches(config, load_source(config), mesh, 0)
    for batch in itertools.islice(batches, STEPS):
        state, metrics = step(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    shares = {
        name: max(shard.data.size for shard in x.addressable_shards) / x.size
        for name, x in _flat(state)
        if x.size > 1000
    }
    return {
        "losses": losses,
        "shares": shares,
        "traces": step._cache_size(),
        "collectives": hlo.summary(
            hlo.collectives(step.lower(state, batch, frozen).compile().as_text())
        ),
        "block_bytes": sum(x.nbytes for name, x in _flat(state.params) if "blocks" in name),
        "bytes": sum(x.nbytes for _, x in _flat(state.params)),
    }


def sampling(solver: str) -> float:
    """The largest difference between images made by eight devices and by one, in [-1, 1]."""
    config = load_config("configs/digits.py", [*TINY, f"sample.solver={solver}", "sample.num_steps=4"])
    sampler, index = build_sampler(config), np.arange(16)
    params = calm(sampler.model)

    def ends(params, index):
        conditions = class_conditions(index % 10, 10)
        return sampler.sample(params, sampler.draw_noise(image_keys(0, index)), *conditions)[-1]

    found = []
    for count in (1, 8):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("images",))
        split = jax.shard_map(
            ends, mesh=mesh, in_specs=(P(), P("images")), out_specs=P("images"), check_vma=False
        )
        found.append(np.asarray(jax.jit(split)(params, index)))
    return float(np.abs(found[0] - found[1]).max())


def shared_sampling() -> float:
    """The largest difference between the end images of one device and of 2 x 4 that share tokens."""
    config = load_config("configs/digits.py", [*TINY, "sample.num_steps=4"])
    sampler, index = build_sampler(config), np.arange(4)
    params = calm(sampler.model)
    mesh, start = sharding.make_mesh(1, 2, context=4), FromSeed(0)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    args = ({"index": index}, *class_conditions(index % 10, 10))
    alone = make_generate(sampler, start)(params, *args)
    shared = make_generate(sampler, start, mesh, sharding.specs(params, mesh))(placed, *args)
    pairs = [(alone.pixels, shared.pixels), *zip(alone.stages, shared.stages, strict=True)]
    return max(float(np.abs(np.int32(a) - np.int32(b)).max()) for a, b in pairs)


def _flat(tree) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


if __name__ == "__main__":
    results = {name: run(*mesh) for name, mesh in MESHES.items()}
    for name in DISTILLED:
        results[f"distilled_{name}"] = run(*MESHES[name], "distill.teacher=given")
    for name in ("one", "mixed_accumulated"):
        results[f"muon_{name}"] = run(*MESHES[name], "optimizer.name=muon")
    results["bfloat16"] = run(1, 1, 1, 1, "dtype=bfloat16")
    results["bfloat16_fsdp"] = run(1, 8, 1, 1, "dtype=bfloat16")
    results["remat_fsdp"] = run(1, 8, 1, 1, "model.remat=full", "model.scan_unroll=1")
    results["offload_fsdp"] = run(1, 8, 1, 1, "model.remat=offload", "model.scan_unroll=1")
    results["remat_context"] = run(2, 2, 2, 1, "model.remat=dots", "model.scan_unroll=1")
    results["shared_sampling"] = shared_sampling()
    results["sampling"] = {solver: sampling(solver) for solver in ("euler", "ab2", "dopri5")}
    json.dump(results, sys.stdout)
