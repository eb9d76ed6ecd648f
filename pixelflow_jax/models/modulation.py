"""A sequence's scale, shift and gate on its packed tokens, with no copy of them for every token.

Group by group the vectors are broadcast where they are used, and their gradients summed where they
arise: six vectors copied to all tokens would take more memory than the rest of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pixelflow_jax.packing import MixedLayout, PackLayout


def modulate(
    layout: PackLayout | MixedLayout,
    x: Float[Array, "rows n d"],
    scale: Float[Array, "rows s d"],
    shift: Float[Array, "rows s d"] | None,
    dtype: Any,
) -> Float[Array, "rows n d"]:
    """x * scale + shift with each token's own sequence's vectors, in at least float32; then `dtype`."""
    lanes = layout.lanes if isinstance(layout, MixedLayout) else layout
    return _modulate(lanes, jnp.dtype(dtype), x, scale, shift)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _modulate(layout, dtype, x, scale, shift):
    parts = []
    vectors = [layout.split_sequences(y) if y is not None else None for y in (scale, shift)]
    for place, part in enumerate(layout.unpack(x)):
        part = part * vectors[0][place][:, :, None]
        if shift is not None:
            part = part + vectors[1][place][:, :, None]
        parts.append(part.astype(dtype))
    return layout.pack(parts)


def _forward(layout, dtype, x, scale, shift):
    return _modulate(layout, dtype, x, scale, shift), (x, scale, shift is not None)


def _backward(layout, dtype, saved, grad):
    x, scale, has_shift = saved
    to_x, to_scale, to_shift = [], [], []
    groups = zip(layout.unpack(x), layout.unpack(grad), layout.split_sequences(scale), strict=True)
    for part, g, factor in groups:
        g = g.astype(scale.dtype)
        to_x.append((g * factor[:, :, None]).astype(x.dtype))
        to_scale.append((g * part).sum(axis=2))
        to_shift.append(g.sum(axis=2))
    shift = jnp.concatenate(to_shift, axis=1) if has_shift else None
    return layout.pack(to_x), jnp.concatenate(to_scale, axis=1), shift


_modulate.defvjp(_forward, _backward)
