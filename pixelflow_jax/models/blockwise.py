"""Attention on CPUs: one head and one block of queries at a time, with a custom backward pass.

On a CPU, XLA multiplies two matrices twice as fast as stacks of thin ones, and the scores of a block
stay in cache. The backward pass recomputes them from the saved logarithm of the softmax's denominator:
five products (scores, dP, dV, dQ, dK) and no more memory than the forward pass (FlashAttention-2, arXiv
2307.08691, algorithm 2).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

FORWARD, BACKWARD = 1024, 512  # queries per block, at most
SAVED = "attention"  # the checkpoint name, for remat policies, of what the backward pass needs


def blockwise_attention(q, k, v, key_mask=None):
    """Return `attention` without a key mask."""
    del key_mask
    b, n, h, d = q.shape

    def heads(x):  # [b, n, h, d] -> [b h, n, d]
        return jnp.swapaxes(x, 1, 2).reshape(b * h, x.shape[1], d)

    q = q * jnp.asarray(d**-0.5, q.dtype)
    out = _attend(*map(heads, (q, k, v)))
    return jnp.swapaxes(out.reshape(b, h, n, d), 1, 2)


def block_size(length: int, most: int) -> int:
    """Return the queries per block: the largest divisor up to `most`; `length` if it is below 64."""
    best = max(size for size in range(1, min(length, most) + 1) if length % size == 0)
    return best if best >= 64 else length


@jax.custom_vjp
def _attend(q: Float[Array, "g n d"], k: Float[Array, "g m d"], v: Float[Array, "g m d"]):
    return _forward(q, k, v)[0]


def _fwd(q, k, v):
    out, lse = (checkpoint_name(x, SAVED) for x in _forward(q, k, v))
    return out, (q, k, v, out, lse)


_attend.defvjp(_fwd, lambda saved, grad: tuple(_backward(*saved, grad)))


def _folded(function):
    """Fold the axis of a vmap into the heads, so that products remain those of two matrices."""
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def rule(size, batched, *args):
        def fold(x, has_axis):
            x = x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        outs = folded(*jax.tree.map(fold, args, tuple(batched)))
        outs = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), outs)
        return outs, jax.tree.map(lambda _: True, outs)

    return folded


def _blocks(x: Float[Array, "n ..."], most: int = BACKWARD) -> Float[Array, "blocks size ..."]:
    return x.reshape(-1, block_size(len(x), most), *x.shape[1:])


def _scores(q: Float[Array, "n d"], k: Float[Array, "m d"]) -> Float[Array, "n m"]:
    return jnp.dot(q, k.T, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))


@_folded
def _forward(q, k, v):
    """Return (out [g, n, d], log of the sum of exponentials [g, n])."""

    def one_head(args):
        q, k, v = args

        def one_block(q):
            scores = _scores(q, k)
            top = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            out = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=scores.dtype) / total
            return out.astype(v.dtype), (top + jnp.log(total))[:, 0]

        out, lse = jax.lax.map(one_block, _blocks(q, FORWARD))
        return out.reshape(q.shape), lse.reshape(-1)

    return jax.lax.map(one_head, (q, k, v))


@_folded
def _backward(q, k, v, out, lse, grad):
    """Return the gradients with respect to q, k and v."""

    def one_head(args):
        q, k, v, out, lse, grad = args
        dtype = lse.dtype
        shift = (out.astype(dtype) * grad.astype(dtype)).sum(axis=-1)

        def one_block(total, part):  # total: the gradients of k and v so far, transposed
            q, q_t, lse, grad, grad_t, shift = part
            weights = jnp.exp(_scores(q, k) - lse[:, None])
            to_weights = jnp.dot(grad, v.T, preferred_element_type=dtype)
            to_scores = (weights * (to_weights - shift[:, None])).astype(q.dtype)
            weights = weights.astype(q.dtype)
            dk_t = total[0] + jnp.dot(q_t, to_scores, preferred_element_type=dtype)
            dv_t = total[1] + jnp.dot(grad_t, weights, preferred_element_type=dtype)
            return (dk_t, dv_t), jnp.dot(to_scores, k, preferred_element_type=dtype)

        # [d, size] x [size, m] takes less than half the time of [m, size] x [size, d]
        transposed = (jnp.swapaxes(_blocks(x), 1, 2) for x in (q, grad))
        q_t, grad_t = jax.lax.optimization_barrier(tuple(transposed))
        zeros = tuple(jnp.zeros(x.shape[::-1], dtype) for x in (k, v))
        parts = (_blocks(q), q_t, _blocks(lse), _blocks(grad), grad_t, _blocks(shift))
        (dk_t, dv_t), dq = jax.lax.scan(one_block, zeros, parts)
        return dq.reshape(q.shape).astype(q.dtype), dk_t.T.astype(k.dtype), dv_t.T.astype(v.dtype)

    return jax.lax.map(one_head, (q, k, v, out, lse, grad))
