"""The device mesh, and how parameters and batches are sharded over it.

The mesh has three axes. `data` replicates the parameters, `fsdp` shards them, and the batch is split
over both. Devices along `context` share their images: each holds a part of every sequence of tokens
(cascade/packing.py). The train step runs under shard_map: each device works on its own packed row,
gathers a layer's parameters just before using them, and receives its shard of their gradient from a
reduce-scatter, the transpose of that gather. All collectives are written here.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pixelflow_jax.cascade.packing import CONTEXT
from pixelflow_jax.common import UserError, hardware

AXES = ("data", "fsdp")
BATCH = P(AXES)
GATHERED = "gathered_parameters"  # name of what the backward pass gathers again instead of keeping
SCANNED = "blocks"  # parameters below this name have a leading layer axis, which is never sharded


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None, context: int = 1) -> Mesh:
    """Return a mesh with the axes `data`, `fsdp` and `context`.

    One of `data` and `fsdp` may be -1 for the remaining devices. With several TPU slices, `data` runs
    over the slow network between them, so its size must be a multiple of their number; `fsdp` and
    `context` stay within a slice. On GPUs they stay within a node where they fit.

    Raises UserError if the sizes do not fit the devices; the message suggests sizes that do.
    """
    devices = (hardware.local_devices() and jax.devices()) if devices is None else devices
    tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    rest = len(devices) // (max(data, 1) * max(fsdp, 1) * max(context, 1))
    sizes = [rest if size == -1 else size for size in (data, fsdp, context)]
    if np.prod(sizes) != len(devices) or sizes[0] % slices:
        inside = len(devices) // slices
        shared = _largest_divisor(inside, context)
        split = _largest_divisor(inside // shared, sizes[1] or inside)
        raise UserError(
            f"config.mesh.data={data}, config.mesh.fsdp={fsdp}"
            + (f", config.mesh.context={context}" if context > 1 else "")
            + f" do not fit {len(devices)} devices: their product must be that number (-1 is the rest)"
            + (f", and data a multiple of the {slices} slices" if slices > 1 else "")
            + f". What fits: --config.mesh.data=-1 --config.mesh.fsdp={split}"
            + (f" --config.mesh.context={shared}" if context > 1 else "")
        )
    return Mesh(_arrange(sizes, devices, slices), (*AXES, CONTEXT))


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(most, 1))


def _arrange(sizes: list[int], devices: list, slices: int) -> np.ndarray:
    """Return the devices as an array of `sizes`, with the closest neighbours along the last axes."""
    if devices[0].platform != "tpu":  # node by node
        attributes = ("slice_index", "process_index", "id")
        place = [[getattr(d, name, None) or 0 for name in attributes] for d in devices]
        order = sorted(range(len(devices)), key=place.__getitem__)
        return np.array(devices)[order].reshape(sizes)
    inner, outer = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    for split in (False, True):  # whether a mesh axis may use a part of a torus axis
        options = dict(devices=devices, allow_split_physical_axes=split)
        try:
            if slices > 1:
                return mesh_utils.create_hybrid_device_mesh(inner, outer, **options)
            return mesh_utils.create_device_mesh(sizes, **options)
        except (NotImplementedError, AssertionError, ValueError):  # no torus, or an incomplete one
            continue
    return np.array(devices).reshape(sizes)


def batch_shards(mesh: Mesh) -> int:
    """Return the number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_spec(path: str, shape: tuple[int, ...], fsdp: int) -> P:
    """Return the spec of a parameter (or of its moments and averages).

    Matrices are sharded along the first axis that `fsdp` divides, except the layer axis of scanned
    blocks. Vectors are small and replicated.
    """
    skip = 1 if SCANNED in path.split("/") else 0
    own = shape[skip:]
    if fsdp > 1 and len(own) >= 2:
        for axis, size in enumerate(own):
            if size % fsdp == 0:
                return P(*[None] * (skip + axis), "fsdp")
    return P()


def specs(tree: Any, mesh: Mesh) -> Any:
    """Return the spec of every leaf of a state or of parameters (arrays or shapes)."""

    def one(path, leaf):
        return param_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, fsdp)

    fsdp = mesh.shape["fsdp"]
    return jax.tree_util.tree_map_with_path(one, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of every leaf of a state or of parameters (arrays or shapes)."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh))


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Return the shape, dtype and sharding of every leaf of a state or of parameters."""

    def one(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(one, tree, shardings(tree, mesh))


def placed(tree: Any, where: Any) -> Any:
    """Return arrays that every host holds whole as global arrays; each device receives its own part."""

    def one(x, where):
        return jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__)

    return jax.tree.map(one, tree, where)


def gather(params: Any, param_specs: Any, dtype: Any) -> Any:
    """Inside shard_map: gather whole matrices from each device's shard, in the compute dtype.

    The backward pass runs the transpose, a reduce-scatter of the gradient in that dtype.
    """

    def one(x, spec):
        if "fsdp" not in spec:
            return x
        whole = jax.lax.all_gather(x.astype(dtype), "fsdp", axis=spec.index("fsdp"), tiled=True)
        return checkpoint_name(whole, GATHERED)

    return jax.tree.map(one, params, param_specs, is_leaf=lambda x: isinstance(x, P))


def layer_gather(param_specs: Any, dtype: Any) -> Callable[[Any], Any]:
    """Return `gather` for one layer of the scanned blocks, whose leaves have no layer axis."""
    inner = jax.tree.map(lambda spec: P(*spec[1:]), param_specs, is_leaf=lambda x: isinstance(x, P))
    return lambda params: gather(params, inner, dtype)


def gather_rest(params: Any, param_specs: Any, dtype: Any) -> Any:
    """Apply `gather` to all parameters except those of the scanned blocks."""
    rest = [name for name in params if name != SCANNED]
    whole = gather(*({name: tree[name] for name in rest} for tree in (params, param_specs)), dtype)
    return {**params, **whole}


def reduce_gradients(grads: Any, param_specs: Any) -> Any:
    """Inside shard_map: sum the gradients over the devices."""

    def one(grad, spec):
        axes = ("data", CONTEXT) if "fsdp" in spec else (*AXES, CONTEXT)
        # On CPU, the sum over one device is a copy
        return jax.lax.psum(grad, axes) if jax.lax.axis_size(axes) > 1 else grad

    return jax.tree.map(one, grads, param_specs, is_leaf=lambda x: isinstance(x, P))


def local_rows(sharding: NamedSharding, size: int) -> np.ndarray:
    """Return the indices in a batch of `size` that this process must load, in order."""
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for (index,) in slices]))


def place_batch(batch: dict[str, np.ndarray], sharding: NamedSharding, size: int) -> dict:
    """Return global arrays of `size` entries from the part that each process has loaded."""
    return {
        name: jax.make_array_from_process_local_data(sharding, part, (size, *part.shape[1:]))
        for name, part in batch.items()
    }
