"""Checksums of arrays, which catch what a file format lets pass, such as a flipped bit."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit  # one program for the whole tree: several concurrent ones with collectives could deadlock
def _checksums(tree: Any) -> list[jax.Array]:
    return [_fingerprint(x) for x in jax.tree.leaves(tree)]


def _fingerprint(x: jax.Array) -> jax.Array:
    """Return a 32-bit checksum of an array's bits and their places, the same on every mesh.

    It is a sum modulo 2^32, so the order of summation does not matter.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def fingerprints(tree: Any) -> dict[str, list]:
    """Return {path: [dtype, checksum]} of every array."""
    sums = jax.device_get(_checksums(tree))
    return {
        jax.tree_util.keystr(path): [str(x.dtype), int(value)]
        for (path, x), value in zip(jax.tree_util.tree_leaves_with_path(tree), sums, strict=True)
    }


def check_fingerprints(name: str, tree: Any, meta: dict[str, Any]) -> None:
    """Raise ValueError if an array differs in any bit from the one that was saved."""
    known = meta.get("fingerprints", {}).get(name)
    if known is None:
        return
    for path, (dtype, value) in fingerprints(tree).items():
        was = known.get(path)
        if was is None or (was[0] == dtype and was[1] != value):
            raise ValueError(f"{name}{path} is not what was saved (its checksum differs)")


def params_hash(params: dict) -> str:
    """Return the SHA-256 of parameters: names, shapes and bytes."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()
