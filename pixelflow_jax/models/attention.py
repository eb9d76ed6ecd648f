"""Attention behind one door, `attention`, with a backend per platform and length.

Softmax runs in at least float32, whatever the inputs' dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -10000.0  # what the released text model adds to the scores of padding
BLOCK = 256  # queries a block of the blockwise backend


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_mask: Bool[Array, "b m"] | None = None,
    backend: str = "auto",
    platform: str | None = None,
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v for every batch entry and head.

    Args:
      q, k, v: queries, keys and values.
      key_mask: True where a key may be attended to; None means everywhere.
      backend: "einsum" (all scores at once), "blockwise" (one block of queries at a time, so that
        long sequences stay in cache) or "auto" (by platform and length).
      platform: what it will run on, for "auto"; None is JAX's default.
    """
    if backend == "auto":
        long = q.shape[1] >= 4 * BLOCK and q.shape[1] % BLOCK == 0
        on_gpu = (platform or jax.default_backend()) in ("gpu", "cuda", "rocm")
        backend = "blockwise" if long and not on_gpu else "einsum"
    return BACKENDS[backend](q, k, v, key_mask)


def einsum_attention(q, k, v, key_mask=None):
    """All scores at once: [b, h, n, m] in memory."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=dtype)
    scores = scores * (q.shape[-1] ** -0.5)
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None, :], scores, scores + MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def blockwise_attention(q, k, v, key_mask=None):
    """One block of queries at a time; the backward pass recomputes the scores of its block."""
    batch, length, heads, head_dim = q.shape
    blocks = jnp.moveaxis(q.reshape(batch, length // BLOCK, BLOCK, heads, head_dim), 1, 0)
    one_block = jax.checkpoint(functools.partial(einsum_attention, k=k, v=v, key_mask=key_mask))
    out = jax.lax.map(one_block, blocks)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


BACKENDS = {"einsum": einsum_attention, "blockwise": blockwise_attention}
