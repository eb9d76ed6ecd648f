"""Attention on TPUs: JAX's Pallas kernel (splash attention), forward and backward.

Scores stay in VMEM. The backward kernel is the fused one: five products per pair of blocks (scores, dP,
dV, dK, dQ), where separate kernels for dQ and for dK and dV take seven.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pixelflow_jax.models.attention import fill

LANES = 128  # lengths are multiples of it
# Queries and keys per block, at most, in the forward pass, by generation. VMEM holds a block of scores
# in float32: v4 has 16 MiB per core, later generations more.
BLOCKS = {"v4": (512, 512), "v5e": (1024, 1024), "v5p": (1024, 1024), "v6e": (1024, 1024)}
# The same in the backward pass, which writes the gradient of q once per block of keys, to be summed: few
# and large blocks are faster. Larger ones do not fit on v4 and v5p, nor on v5e with 16,384 tokens.
BACKWARD = (512, 2048)
COMPUTE = 512  # keys per product
PADDING = -1  # the segment id of padding up to a multiple of LANES


def splash_attention(q, k, v, key_mask=None, generation="", interpret=False):
    """Return `attention` for any length, padded to a multiple of 128; segment ids mask keys and padding.

    Masked keys get weight zero, which equals adding -10000 to their scores. If all keys of a sequence
    are masked, none is, as there.

    Args:
      q, k, v, key_mask: as for `attention`.
      generation: of TPU, a key of BLOCKS; others take conservative block sizes.
      interpret: run the kernel on another platform, slowly.
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

    queries, keys = q.shape[2], k.shape[2]
    block_q, block_kv = map(_block, (queries, keys), BLOCKS.get(generation, (512, 512)))
    back_q, back_kv = map(_block, (queries, keys), BACKWARD)
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=_block(block_kv, COMPUTE),
        block_q_dkv=back_q,
        block_kv_dkv=back_kv,
        block_kv_dkv_compute=_block(back_kv, COMPUTE),
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * q.shape[1])
    run = kernel.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    return jnp.swapaxes(jax.vmap(run)(q, k, v, segments), 1, 2)[:, :n]


def _block(length: int, most: int) -> int:
    """Return the largest multiple of LANES, at most `most`, that divides `length`."""
    return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)
