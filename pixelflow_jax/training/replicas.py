"""Replicas of a state: the first copy is read from storage, the others receive it over the network.

Orbax can broadcast while it reads, but then a process that fails leaves the others waiting. Here all
processes agree that the read succeeded before anything is broadcast.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pixelflow_jax.cascade.packing import CONTEXT

COPIES = ("data", CONTEXT)  # mesh axes along which the state is replicated


def first_copy(template: Any) -> Any:
    """Return `template` restricted to the devices that hold the first copy.

    If every process has such devices, return the template itself.
    """
    mesh = jax.tree.leaves(template)[0].sharding.mesh
    one = tuple(slice(1) if axis in COPIES else slice(None) for axis in mesh.axis_names)
    first = Mesh(mesh.devices[one], mesh.axis_names)
    if len({device.process_index for device in first.devices.flat}) == jax.process_count():
        return template

    def move(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(first, x.sharding.spec))

    return jax.tree.map(move, template)


def holds(template: Any) -> bool:
    """Return whether this process has devices that hold arrays like these."""
    return bool(jax.tree.leaves(template)[0].sharding.addressable_devices)


def copy_to_all(tree: Any, first: Any, template: Any) -> Any:
    """Return arrays like `template`, bit for bit those of `tree`. All processes must call it.

    Args:
      tree: arrays like `first`; ignored on a process that `holds` none of them.
      first: `first_copy(template)`.
      template: arrays or shapes, with shardings.
    """
    if first is template:
        return tree
    likes, form = jax.tree.flatten(template)
    parts = jax.tree.leaves(tree) if holds(first) else [None] * len(likes)
    # One leaf at a time, so that no second copy of the whole state is in memory.
    copies = [jax.block_until_ready(_copy(x, like)) for x, like in zip(parts, likes, strict=True)]
    return jax.tree.unflatten(form, copies)


def _copy(x: jax.Array | None, like: Any) -> jax.Array:
    """Sum over all copies, of which all but the first are zero; as bits, because -0.0 + 0.0 is 0.0."""
    mesh, bits = like.sharding.mesh, jnp.dtype(f"uint{8 * like.dtype.itemsize}")
    where = NamedSharding(mesh, P(*COPIES, *like.sharding.spec))
    shape = (*(mesh.shape[axis] for axis in COPIES), *like.shape)
    held = {part.device: part.data for part in x.addressable_shards} if x is not None else {}

    def part(device):
        if device in held:
            return jax.lax.bitcast_convert_type(held[device], bits)[None, None]
        return jnp.zeros(where.shard_shape(shape), bits, device=device)

    parts = [part(device) for device in where.addressable_devices]
    stacked = jax.make_array_from_single_device_arrays(shape, where, parts)
    return _add(like.dtype, like.sharding)(stacked)


@functools.lru_cache
def _add(dtype: Any, where: NamedSharding):
    def add(stacked):
        return jax.lax.bitcast_convert_type(stacked.sum(axis=(0, 1), dtype=stacked.dtype), dtype)

    return jax.jit(add, out_shardings=where)
