"""Attention behind one door, `attention`, with a backend per platform and length.

Softmax runs in at least float32, whatever the inputs' dtype.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from pixelflow_jax.common.hardware import platform_of
from pixelflow_jax.models.blockwise import blockwise_attention

MASKED = -10000.0  # what the released text model adds to the scores of padding
ABSENT = -1e30  # the score of a key that is not there; finite, so that no gradient is NaN
CHUNK = 16  # keys of the first chunk where keys are masked


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
      q, k, v: queries, keys and values, of one dtype.
      key_mask: True for the keys that are there, False for the padding after them; None means all are.
      backend: a name of BACKENDS, "splash" (TPU's kernel; elsewhere it is interpreted, for tests), or
        "auto": the one for the platform and the shapes. Einsum stands in for one that cannot.
      platform: what it will run on, as `hardware.platform_of` says it; None is JAX's default.
    """
    platform = platform or platform_of(jax.devices()[0])
    if backend == "auto":
        backend = choose_backend(platform, q, k, key_mask)
    elif not can_run(backend, platform, q, key_mask):
        backend = "einsum"
    if backend == "splash":
        from pixelflow_jax.models.splash import splash_attention  # Pallas takes a second to import

        generation = platform.removeprefix("tpu").strip()
        return splash_attention(q, k, v, key_mask, generation, not platform.startswith("tpu"))
    return BACKENDS[backend](q, k, v, key_mask)


def choose_backend(
    platform: str,
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    key_mask: Bool[Array, "b m"] | None = None,
) -> str:
    """The backend for a platform and for arguments, which may be abstract.

    TPU: the kernel, from a length of 128 on. GPU: cuDNN. CPU: head by head from a length of 128 on. All
    at once ("einsum") elsewhere, and where these cannot.
    """
    backend = {"tpu": "splash", "gpu": "cudnn", "cpu": "blockwise"}.get(platform.partition(" ")[0])
    long = backend == "cudnn" or min(q.shape[1], k.shape[1]) >= 128
    return backend if backend and long and can_run(backend, platform, q, key_mask) else "einsum"


def can_run(backend: str, platform: str, q, key_mask=None) -> bool:
    """Whether a backend takes such queries and masks there; keys and values are as the queries are."""
    if backend == "splash":
        return q.dtype in (jnp.bfloat16, jnp.float32)
    if backend == "cudnn":  # heads: the bound of Ampere's kernel, the tightest
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        heads = q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
        return platform == "gpu" and half and heads
    return backend != "blockwise" or key_mask is None


def einsum_attention(q, k, v, key_mask=None):
    """All scores at once: [b, h, n, m] in memory."""
    if key_mask is not None:
        return _masked_attention(q, k, v, key_mask)
    weights = jax.nn.softmax(_scores(q, k), axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def _scores(q, k):
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=dtype) * (q.shape[-1] ** -0.5)


def key_chunks(count: int) -> list[slice]:
    """Chunks of a text of `count` tokens; the last may go beyond it."""
    ends = [CHUNK]
    while ends[-1] < count:
        ends.append(2 * ends[-1])
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def by_chunks(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """`function` of [..., t, c] to arrays [..., t, d], a chunk of t at a time, each of full length."""

    def apply(x):
        count, chunks = x.shape[-2], key_chunks(x.shape[-2])
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, chunks[-1].stop - count), (0, 0)])
        parts = [function(x[..., part, :]) for part in chunks]
        return jax.tree.map(lambda *p: jnp.concatenate(p, axis=-2)[..., :count, :], *parts)

    return apply


def _masked_attention(q, k, v, key_mask):
    """Keys in chunks that end at 16, 32, 64, ..., added up one after the other.

    So the order of the sums does not depend on how many keys there are, and padding, whose weights are
    exact zeros, changes no bit by its length either.
    """
    count, chunks = k.shape[1], key_chunks(k.shape[1])
    widen = [(0, 0), (0, chunks[-1].stop - count), (0, 0), (0, 0)]
    k, v = jnp.pad(k, widen), jnp.pad(v, widen)
    key_mask = jnp.pad(key_mask, widen[:2])[:, None, None, :]

    scores = []
    for part in chunks:
        found = _scores(q, k[:, part])
        found = jnp.where(key_mask[..., part], found, found + MASKED)
        scores.append(jnp.where(jnp.arange(part.start, part.stop) < count, found, ABSENT))
    top = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in scores])
    out = total = 0
    for part, found in zip(chunks, scores, strict=True):
        weights = jnp.exp(found - jax.lax.stop_gradient(top))
        total += weights.sum(axis=-1)
        out += jnp.einsum(
            "bhnm,bmhd->bnhd", weights.astype(v.dtype), v[:, part], preferred_element_type=found.dtype
        )
    return (out / jnp.swapaxes(total, 1, 2)[..., None]).astype(v.dtype)


def cudnn_attention(q, k, v, key_mask=None):
    """NVIDIA's fused kernel.

    Its backward pass takes even lengths alone, so that odd ones are filled up.
    """
    b, n, m = len(q), q.shape[1], k.shape[1]
    q, k, v = (fill(x, 2) for x in (q, k, v))
    lengths = {}
    if key_mask is not None or k.shape[1] > m:
        there = jnp.full(b, m) if key_mask is None else key_mask.sum(axis=-1)
        there = jnp.where(there == 0, m, there)  # masked everywhere is as good as nowhere
        # JAX's rule for vmap wants its axis on the lengths too; this is zero, whatever q holds
        zero = (jnp.isnan(q[:, 0, 0, 0]) & False).astype(jnp.int32)
        lengths = dict(query_seq_lengths=zero + q.shape[1])
        lengths |= dict(key_value_seq_lengths=zero + there.astype(jnp.int32))
    return jax.nn.dot_product_attention(q, k, v, **lengths, implementation="cudnn")[:, :n]


def fill(x: Shaped[Array, "b n ..."], multiple: int, value: int = 0) -> Shaped[Array, "b n2 ..."]:
    """`x`, filled up along n to a multiple."""
    missing = -x.shape[1] % multiple
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value) if missing else x


BACKENDS = {
    "einsum": einsum_attention,  # all scores at once
    "blockwise": blockwise_attention,  # CPU's: one head and one block of queries at a time
    "cudnn": cudnn_attention,
}
