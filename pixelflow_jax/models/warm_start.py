"""Parameters for a model from those of another one: text from class labels, other patch sizes."""

import math
from collections.abc import Sequence

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pixelflow_jax.common import UserError
from pixelflow_jax.models.transformer import layer_name

DIFFERENCES = 0.5  # of a larger patch's random part, relative to the old kernel; 1.5 trained no better


def from_class_model(params: dict, fresh: dict) -> dict:
    """Return a text model's parameters from those of a class model of the same size.

    Parameters that only a text model has come from `fresh`. The embedding of the null class is added to
    the bias of the size embedding. With `cross_gate`, the initial velocity is therefore the class
    model's for the null class.
    """
    size, classes = params["size_embed"], params["class_embed"]["embedding"]
    last = {**size["linear_2"], "bias": size["linear_2"]["bias"] + classes[-1]}
    old = flatten_dict({**params, "size_embed": {**size, "linear_2": last}})
    return unflatten_dict({path: old.get(path, x) for path, x in flatten_dict(fresh).items()})


def with_patch_sizes(params: dict, old: Sequence[int], new: Sequence[int]) -> dict:
    """Return parameters for the patch sizes `new` from those for `old`.

    A patch of a new size begins as the patches of the largest old size that tile it: it is embedded as
    the mean of their embeddings, and each of them gets the same output (PPFlow, arXiv 2506.23543). To
    the embedding we add a small random map of how these patches differ. Without it, neither layer gets a
    gradient for the differences as long as the other ignores them, and training stays at this saddle.
    Sizes that are in both keep their parameters.

    Raises UserError for a new size that no old one divides.
    """
    if {*old} == {*new}:
        return params
    layers = {}
    for size in {*new}:
        fitting = [q for q in old if size % q == 0]
        if not fitting:
            raise UserError(
                f"config.model.patch_size {size} must be a multiple of a size that the parameters have: "
                f"{', '.join(map(str, sorted({*old})))}"
            )
        for name, grow in (("patch_embed", _grow_embedding), ("head", _grow_head)):
            layer = params[layer_name(name, max(fitting), old)]
            layers[layer_name(name, size, new)] = grow(layer, size // max(fitting))
    gone = {layer_name(name, q, old) for name in ("patch_embed", "head") for q in old}
    return {name: x for name, x in params.items() if name not in gone} | layers


def _grow_embedding(layer: dict, times: int) -> dict:
    if times == 1:
        return layer
    old = np.asarray(layer["kernel"])
    side, width = math.isqrt(len(old) // 3), old.shape[1]
    shape = times, side, times, side, 3, width
    differences = DIFFERENCES * old.std() * np.random.default_rng(0).standard_normal(shape)
    differences -= differences.mean(axis=(0, 2), keepdims=True)  # equal patches have none
    mean = _tile(old.T, times).T / times**2
    return {**layer, "kernel": (mean + differences.reshape(-1, width)).astype(old.dtype)}


def _grow_head(layer: dict, times: int) -> dict:
    return {name: _tile(x, times) for name, x in layer.items()} if times > 1 else layer


def _tile(x: np.ndarray, times: int) -> np.ndarray:
    """Repeat patches [..., row * column * channel] `times` times along each side."""
    side = math.isqrt(x.shape[-1] // 3)
    patch = np.reshape(x, (*x.shape[:-1], side, side, 3))
    return np.tile(patch, (times, times, 1)).reshape(*x.shape[:-1], -1)
