"""`attention` and the choice of its backend, by platform and shapes.

The softmax runs in at least float32, whatever the dtype of the inputs.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from pixelflow_jax.common.hardware import platform_of
from pixelflow_jax.models.blockwise import blockwise_attention

MASKED = -10000.0  # added to the scores of padding, as in the released text model
ABSENT = -1e30  # the score of keys beyond the last; finite, so that no gradient is NaN
MANY = 256  # tokens, whose scores are better not computed all at once
CHUNK = 16  # keys in the first chunk of a masked sequence


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_mask: Bool[Array, "b m"] | None = None,
    backend: str = "auto",
    platform: str | None = None,
) -> Float[Array, "b n h d"]:
    """Return softmax(q k^T / sqrt(d)) v for every batch entry and head.

    Args:
      q, k, v: queries, keys and values, of one dtype.
      key_mask: True for keys, False for the padding after them; None: there is no padding.
      backend: a name of BACKENDS; "splash", the TPU kernel (interpreted elsewhere, for tests); or
        "auto", which chooses by platform and shapes. "einsum" replaces a backend that cannot run.
      platform: the target platform, from `hardware.platform_of`; None: that of JAX's first device.
    """
    platform = platform or platform_of(jax.devices()[0])
    if backend == "auto":
        backend = choose_backend(platform, q, k, key_mask)
    elif not can_run(backend, platform, q, key_mask):
        backend = "einsum"
    if backend == "einsum" and key_mask is None and min(q.shape[1], k.shape[1]) >= MANY:
        _tell_of_all_scores(platform, q.dtype.name, q.shape[-1])
    if backend == "splash":
        from pixelflow_jax.models.splash import splash_attention  # Pallas takes a second to import

        generation = platform.removeprefix("tpu").strip()
        return splash_attention(q, k, v, key_mask, generation, not platform.startswith("tpu"))
    return BACKENDS[backend](q, k, v, key_mask)


@functools.cache  # once per process, not per trace
def _tell_of_all_scores(platform: str, dtype: str, head_dim: int) -> None:
    print(
        f"note: attention of {MANY} tokens or more computes all scores at once (einsum): {dtype} heads "
        f"of {head_dim} on {platform}; cuDNN takes bfloat16 heads of at most 128, in multiples of 8",
        file=sys.stderr,
    )


def choose_backend(
    platform: str,
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    key_mask: Bool[Array, "b m"] | None = None,
) -> str:
    """Return the name of the backend for a platform and arguments, which may be abstract.

    TPU: "splash" for lengths from 128. GPU: "cudnn". CPU: "blockwise" for lengths from 128. Otherwise,
    and where these cannot run, "einsum".
    """
    backend = {"tpu": "splash", "gpu": "cudnn", "cpu": "blockwise"}.get(platform.partition(" ")[0])
    long = backend == "cudnn" or min(q.shape[1], k.shape[1]) >= 128
    return backend if backend and long and can_run(backend, platform, q, key_mask) else "einsum"


def can_run(backend: str, platform: str, q, key_mask=None) -> bool:
    """Return whether a backend supports such queries (and keys and values like them) and masks."""
    if backend == "splash":
        return q.dtype in (jnp.bfloat16, jnp.float32)
    if backend == "cudnn":  # heads: the limit of the Ampere kernel, which is the lowest
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        heads = q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
        return platform == "gpu" and half and heads
    return backend != "blockwise" or key_mask is None


def einsum_attention(q, k, v, key_mask=None):
    """Compute all scores at once, [b, h, n, m] in memory."""
    if key_mask is not None:
        return _masked_attention(q, k, v, key_mask)
    weights = jax.nn.softmax(_scores(q, k), axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def _scores(q, k):
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=dtype) * (q.shape[-1] ** -0.5)


def key_chunks(count: int) -> list[slice]:
    """Return the chunks of a text of `count` tokens; the last may extend beyond it."""
    ends = [CHUNK]
    while ends[-1] < count:
        ends.append(2 * ends[-1])
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def by_chunks(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """Return `function`, from [..., t, c] to arrays [..., t, d], applied chunk by chunk along t."""

    def apply(x):
        count, chunks = x.shape[-2], key_chunks(x.shape[-2])
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, chunks[-1].stop - count), (0, 0)])
        parts = [function(x[..., part, :]) for part in chunks]
        return jax.tree.map(lambda *p: jnp.concatenate(p, axis=-2)[..., :count, :], *parts)

    return apply


def _masked_attention(q, k, v, key_mask):
    """Add up the keys in chunks that end at 16, 32, 64, ...

    The order of the sums then does not depend on the number of keys. As padding has weights of exactly
    zero, its length changes no bit either.
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
    """Call NVIDIA's fused kernel, whose backward pass requires even lengths: odd ones are padded."""
    b, n, m = len(q), q.shape[1], k.shape[1]
    q, k, v = (fill(x, 2) for x in (q, k, v))
    lengths = {}
    if key_mask is not None or k.shape[1] > m:
        there = jnp.full(b, m) if key_mask is None else key_mask.sum(axis=-1)
        there = jnp.where(there == 0, m, there)  # all keys masked equals none masked
        # JAX's vmap rule requires its axis on the lengths too; this is zero for any q
        zero = (jnp.isnan(q[:, 0, 0, 0]) & False).astype(jnp.int32)
        lengths = dict(query_seq_lengths=zero + q.shape[1])
        lengths |= dict(key_value_seq_lengths=zero + there.astype(jnp.int32))
    return jax.nn.dot_product_attention(q, k, v, **lengths, implementation="cudnn")[:, :n]


def fill(x: Shaped[Array, "b n ..."], multiple: int, value: int = 0) -> Shaped[Array, "b n2 ..."]:
    """Pad `x` along n to a multiple."""
    missing = -x.shape[1] % multiple
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value) if missing else x


BACKENDS = {"einsum": einsum_attention, "blockwise": blockwise_attention, "cudnn": cudnn_attention}
