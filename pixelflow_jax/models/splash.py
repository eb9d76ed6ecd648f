"""Attention on TPU: JAX's Pallas kernel (splash attention), forward and backward.

Scores never leave the chip's own memory. The backward kernel is the fused one: five products for each
pair of blocks (scores, dP, dV, dK, dQ), where separate kernels for dQ and for dK and dV take seven.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pixelflow_jax.models.attention import fill

LANES = 128  # lengths are multiples of it
# Queries and keys a block at most, forward, by generation. VMEM holds a block of scores in float32: v4
# has 16 MiB a core, the later ones have more.
BLOCKS = {"v4": (512, 512), "v5e": (1024, 1024), "v5p": (1024, 1024), "v6e": (1024, 1024)}
# The backward kernel writes the gradient to q once for each block of keys, to be summed: few and large
# ones. More does not fit on v4 and v5p, nor on v5e with 16,384 tokens.
BACKWARD = (512, 2048)
COMPUTE = 512  # keys a product
PADDING = -1  # the segment of what fills a length up


def splash_attention(q, k, v, key_mask=None, generation="", interpret=False):
    """As `attention`; any length, filled up to a multiple of 128.

    Masked keys get no weight at all, where `einsum` adds -10000 to their scores: the same. If all keys
    of a sequence are masked, that is as good as none.
    """
    b, n, m = len(q), q.shape[1], k.shape[1]
    segments = None
    if key_mask is not None:
        key_mask |= ~key_mask.any(axis=-1, keepdims=True)
        segments = jnp.ones((b, n), jnp.int32), key_mask.astype(jnp.int32)
    elif n % LANES or m % LANES:
        segments = jnp.ones((b, n), jnp.int32), jnp.ones((b, m), jnp.int32)
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q, k, v = (jnp.swapaxes(fill(x, LANES), 1, 2) for x in (q, k, v))
    if segments is not None:
        segments = kernel.SegmentIds(*(fill(ids.astype(jnp.int32), LANES, PADDING) for ids in segments))
    run = _kernel(q.shape[1], q.shape[2], k.shape[2], generation, interpret)
    out = jax.vmap(run)(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2)[:, :n]


def _block(length: int, most: int) -> int:
    """The largest multiple of LANES up to `most` that divides a length."""
    return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)


def _kernel(heads: int, n: int, m: int, generation: str, interpret: bool):
    """The kernel for `n` queries and `m` keys."""
    most_q, most_kv = BLOCKS.get(generation, (512, 512))
    block_q, block_kv = _block(n, most_q), _block(m, most_kv)
    back_q, back_kv = _block(n, BACKWARD[0]), _block(m, BACKWARD[1])
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=_block(block_kv, COMPUTE),
        block_q_dkv=back_q,
        block_kv_dkv=back_kv,
        block_kv_dkv_compute=_block(back_kv, COMPUTE),
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.FullMask((n, m))] * heads)
    make = functools.partial(kernel.make_splash_mha_single_device, mask, block_sizes=sizes)
    return make(interpret=interpret)
