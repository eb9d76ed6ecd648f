"""The mesh of devices, and how parameters and batches are split over it.

Three axes: `data` copies the parameters, `fsdp` splits them; the batch is split over both. Devices along
`context` share their images: each holds a part of every sequence of tokens (packing.py). The train
step runs under shard_map: each device works on its own packed row, gathers a layer's parameters
just before it needs them, and gets its share of their gradient back by a reduce-scatter, which is
the transpose of that gather. So the collectives are those written here and no others.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pixelflow_jax.errors import UserError
from pixelflow_jax.packing import CONTEXT

AXES = ("data", "fsdp")
BATCH = P(AXES)
GATHERED = "gathered_parameters"  # name of what the backward pass gathers again, not keeps
SCANNED = "blocks"  # parameters below this name have a leading layer axis, which is never split


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None, context: int = 1) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `context`; one of the first two may be -1, for the rest.

    With several TPU slices, `data` goes over the slow network between them (so its size is a
    multiple of their number); `fsdp` and `context` stay inside a slice.

    Raises:
      UserError: if the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    known = max(data, 1) * max(fsdp, 1) * context
    rest, left_over = divmod(len(devices), known)
    sizes = [rest if size == -1 else size for size in (data, fsdp, context)]
    if left_over or np.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh.data={data}, config.mesh.fsdp={fsdp}"
            + (f", config.mesh.context={context}" if context > 1 else "")
            + f" do not fit {len(devices)} devices: "
            f"their product must be that number (-1 stands for the rest)"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"config.mesh.data={sizes[0]} must be a multiple of the {slices} slices, so that fsdp "
            f"stays inside a slice"
        )
    if slices > 1:
        inner = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices)
    else:
        try:
            grid = mesh_utils.create_device_mesh(sizes, devices)
        except NotImplementedError:  # an axis of the mesh has to take a part of one of the torus
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, (*AXES, CONTEXT))


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_spec(path: str, shape: tuple[int, ...], fsdp: int) -> P:
    """Which axis of a parameter (or of its moments and averages) is split over `fsdp`.

    Matrices are split along their first axis that `fsdp` divides (the layer axis of scanned blocks
    aside); vectors, which are small, are on every device.
    """
    skip = 1 if SCANNED in path.split("/") else 0
    own = shape[skip:]
    if fsdp > 1 and len(own) >= 2:
        for axis, size in enumerate(own):
            if size % fsdp == 0:
                return P(*[None] * (skip + axis), "fsdp")
    return P()


def specs(tree: Any, mesh: Mesh) -> Any:
    """The spec of every leaf of a state or of parameters (arrays or shapes)."""

    def one(path, leaf):
        return param_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, fsdp)

    fsdp = mesh.shape["fsdp"]
    return jax.tree_util.tree_map_with_path(one, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a state or of parameters (arrays or shapes)."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh))


def gather(params: Any, param_specs: Any, dtype: Any) -> Any:
    """Inside shard_map: whole matrices from each device's part, sent in the compute dtype.

    The transpose, which the backward pass runs, is a reduce-scatter of the gradient in that dtype.
    """

    def one(x, spec):
        if "fsdp" not in spec:
            return x
        whole = jax.lax.all_gather(x.astype(dtype), "fsdp", axis=spec.index("fsdp"), tiled=True)
        return checkpoint_name(whole, GATHERED)

    return jax.tree.map(one, params, param_specs, is_leaf=lambda x: isinstance(x, P))


def layer_gather(param_specs: Any, dtype: Any) -> Callable[[Any], Any]:
    """`gather` for one layer of the scanned blocks, whose leaves have lost their layer axis."""
    inner = jax.tree.map(lambda spec: P(*spec[1:]), param_specs, is_leaf=lambda x: isinstance(x, P))
    return lambda params: gather(params, inner, dtype)


def gather_rest(params: Any, param_specs: Any, dtype: Any) -> Any:
    """`gather` for all parameters but those of the scanned blocks, which are left as they are."""
    rest = [name for name in params if name != SCANNED]
    whole = gather(*({name: tree[name] for name in rest} for tree in (params, param_specs)), dtype)
    return {**params, **whole}


def reduce_gradients(grads: Any, param_specs: Any) -> Any:
    """Inside shard_map: the sum over devices of what each of them holds of the gradients."""

    def one(grad, spec):
        return jax.lax.psum(grad, ("data", CONTEXT) if "fsdp" in spec else (*AXES, CONTEXT))

    return jax.tree.map(one, grads, param_specs, is_leaf=lambda x: isinstance(x, P))


def local_rows(sharding: NamedSharding, size: int) -> np.ndarray:
    """Which entries of a batch of `size` this process must load, in the order of the batch."""
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for (index,) in slices]))


def place_batch(batch: dict[str, np.ndarray], sharding: NamedSharding, size: int) -> dict:
    """Global arrays of `size` entries from what each process has loaded of them."""
    return {
        name: jax.make_array_from_process_local_data(sharding, part, (size, *part.shape[1:]))
        for name, part in batch.items()
    }
