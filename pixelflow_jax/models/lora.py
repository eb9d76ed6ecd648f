"""Low-rank adapters: a fine-tuning that trains few parameters beside frozen ones.

Source: LoRA (arXiv 2106.09685). A matrix W of the blocks' attention or MLP acts as W + scale * a b, with
a [depth, in, rank] and b [depth, rank, out]. As b is 0 at first, fresh adapters change nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from pixelflow_jax.common import UserError, numerics
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.models.transformer import PixelFlow

IN, OUT = "lora_a", "lora_b"  # in place of the matrix's key "kernel"
Path = tuple[str, ...]


def _adapted(params: dict) -> dict[Path, Any]:
    """Return the matrices that have adapters: those of attention and MLP, not of the modulation."""
    return {
        path: x
        for path, x in flatten_dict(params).items()
        if path[0] == sharding.SCANNED and path[-1] == "kernel" and path[-2] != "modulation"
    }


@numerics.pinned()
def init_adapters(model: PixelFlow, rank: int, seed: int) -> dict:
    """Return fresh adapters of a model. Raises UserError if the rank exceeds a side of a matrix."""
    found, key = {}, jax.random.fold_in(numerics.key(seed), 2)
    for number, (path, x) in enumerate(sorted(_adapted(abstract_params(model)).items())):
        depth, rows, columns = x.shape
        if rank > min(rows, columns):
            raise UserError(
                f"config.lora.rank={rank} is larger than a side of {'/'.join(path)}, {rows}x{columns}"
            )
        draw = jax.random.normal(jax.random.fold_in(key, number), (depth, rows, rank), x.dtype)
        found[*path[:-1], IN] = draw / rows**0.5
        found[*path[:-1], OUT] = jnp.zeros((depth, rank, columns), x.dtype)
    return unflatten_dict(found)


def abstract_adapters(model: PixelFlow, rank: int) -> dict:
    """Return the shapes and dtypes of a model's adapters. Raises as `init_adapters`."""
    return jax.eval_shape(lambda: init_adapters(model, rank, 0))


def merged(params: dict, adapters: dict, scale: float = 1.0) -> dict:
    """Return the parameters with their adapters added."""
    flat, pairs = flatten_dict(params), flatten_dict(adapters)
    for path, x in _adapted(params).items():
        change = jnp.einsum("dir,dro->dio", *(pairs[*path[:-1], name] for name in (IN, OUT)),
                            precision="highest")  # fmt: skip
        flat[path] = x + scale * change.astype(x.dtype)
    return unflatten_dict(flat)


def merged_shards(params: dict, adapters: dict, param_specs: dict, adapter_specs: dict) -> dict:
    """Inside shard_map: return each device's shards of `merged`, from its shards of both."""
    specs = flatten_dict(param_specs)
    pairs = flatten_dict(sharding.gather(adapters, adapter_specs, jnp.float32))
    for path in _adapted(params):
        axis = specs[path].index("fsdp") if "fsdp" in specs[path] else 0
        if axis:  # of the matrix [depth, in, out]
            name = (*path[:-1], IN if axis == 1 else OUT)
            size = pairs[name].shape[axis] // jax.lax.axis_size("fsdp")
            begin = jax.lax.axis_index("fsdp") * size
            pairs[name] = jax.lax.dynamic_slice_in_dim(pairs[name], begin, size, axis)
    return merged(params, unflatten_dict(pairs))
