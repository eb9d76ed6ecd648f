"""Layers that every network here consists of: linear layers, norms, embeddings of numbers.

Norms run in at least float32. Source: PixelFlow (arXiv 2504.07963) and the released code.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SINCOS_DIM = 256
Dtype = Any
xavier = nn.initializers.xavier_uniform()
small = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()


def sincos_frequencies() -> Float[np.ndarray, " half"]:
    """Return 10000^(-i/127), i = 0..127, rounded to float32 at every step as in the released code.

    The exponential is rounded correctly. A float32 exp may be off by an ulp, which at T = 999 moves an
    angle by 6e-5 and gradients by 2e-5.
    """
    half = SINCOS_DIM // 2
    exponents = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - 1)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def sincos(x: Float[Array, "..."], dtype: Dtype) -> Float[Array, "... d"]:
    """Return 256 sinusoidal features per number: cosines, then sines."""
    angles = x.astype(dtype)[..., None] * jnp.asarray(sincos_frequencies(), dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def wide(dtype: Dtype) -> Dtype:
    """Return the dtype for norms, modulation and gates: `dtype`, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def flat(function: Callable[..., Array]) -> Callable[..., Array]:
    """Apply a function of [..., d] to a single row [1, n, d] of float32 without its first axis.

    On CPU, that axis keeps XLA from transposing within a product, and JAX 0.10 takes 14 ms in place
    of 0.6 for the sum over a product of [1, 5440, 384]. On TPU, to drop it costs memory, hence float32.
    """

    def apply(x, *args):
        single = x.ndim == 3 and len(x) == 1 and x.dtype == jnp.float32
        return function(x[0], *args)[None] if single else function(x, *args)

    return apply


class Dense(nn.Dense):
    """nn.Dense; a single row loses its first axis (see `flat`)."""

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Do as nn.Module; but not trace how a given parameter was drawn, a quarter of tracing."""
        given = self.has_variable("params", name)
        return self.get_variable("params", name) if given else super().param(name, *args, **kwargs)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d2"]:
        return flat(super().__call__)(x)


@flat
def layer_norm(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Apply LayerNorm without parameters, eps 1e-6; the result is in at least float32."""
    x = x.astype(wide(x.dtype))
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


@flat
def rms_norm(x: Float[Array, "... d"], scale: Float[Array, " d"]) -> Float[Array, "... d"]:
    """Return x / rms(x) * scale, eps 1e-6, computed in at least float32, in x's dtype."""
    y = x.astype(wide(x.dtype))
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return (scale * y).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, eps 1e-6, in at least float32; returns x's dtype."""

    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        return rms_norm(x, scale)


class ScalarEmbedding(nn.Module):
    """Linear-SiLU-Linear on the sinusoidal features of a number: a time or the size of a grid."""

    dim: int
    dtype: Dtype
    param_dtype: Dtype
    last_init: Callable[..., Any] = small

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "... d"]:
        kwargs = dict(kernel_init=small, dtype=self.dtype, param_dtype=self.param_dtype)
        x = sincos(x, wide(self.dtype)).astype(self.dtype)
        x = Dense(self.dim, name="linear_1", **kwargs)(x)
        kwargs["kernel_init"] = self.last_init
        return Dense(self.dim, name="linear_2", **kwargs)(nn.silu(x))
