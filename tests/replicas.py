"""Save a state of odd bits, restore it on several meshes, and print what each process read.

test_sharding.py runs this module in several processes. Each prints one JSON object.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

from pixelflow_jax.config import build_model, default_config, load_config
from pixelflow_jax.distributed import sharding
from pixelflow_jax.distributed.watchdog import joined
from pixelflow_jax.training import checkpoints
from pixelflow_jax.training.optimizer import build_optimizer
from pixelflow_jax.training.step import abstract_state

from conftest import TINY

MESHES = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 1, 2)]  # data, fsdp, context


def read_bytes() -> int:
    """Return how many bytes this process has read so far."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def odd(path, like) -> jax.Array:
    """Return an array like a state's, with -0.0, infinities and denormal numbers."""
    seed = sum(jax.tree_util.keystr(path).encode())
    values = np.random.default_rng(seed).normal(size=like.shape).astype(like.dtype)
    if like.dtype == np.float32 and values.size > 3:
        values.flat[:4] = -0.0, np.inf, 1e-45, -np.inf
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: values[index])


def same_bits(x: jax.Array, y: jax.Array) -> bool:
    """Return whether this process holds the same bits of both. Scalars are not compared."""
    parts = zip(x.addressable_shards, y.addressable_shards, strict=True)
    return x.ndim == 0 or all(bytes(np.asarray(a.data)) == bytes(np.asarray(b.data)) for a, b in parts)


def main(workdir: str) -> None:
    """Run everything."""
    config = load_config("configs/digits.py", [*TINY, "model.head_dim=64"])
    model, optimizer = build_model(config), build_optimizer(config)
    found = {}
    with joined(default_config().hosts):
        templates = [
            abstract_state(config, model, optimizer, sharding.make_mesh(data, fsdp, context=context))
            for data, fsdp, context in MESHES
        ]
        manager = checkpoints.open_manager(workdir)
        state = jax.tree_util.tree_map_with_path(odd, templates[2])
        state = dataclasses.replace(state, step=state.step * 0 + 3)
        checkpoints.save(manager, state, config)
        checkpoints.check_background_save(manager, wait=True)
        for mesh, template in zip(MESHES, templates, strict=True):
            before = read_bytes()
            restored, _ = checkpoints.restore_newest(manager, template)
            read = read_bytes() - before
            expected = jax.tree.leaves(jax.tree_util.tree_map_with_path(odd, template))
            same = [same_bits(*pair) for pair in zip(jax.tree.leaves(restored), expected, strict=True)]
            found[str(mesh)] = dict(read=read, same=all(same), step=int(restored.step))
        manager.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
