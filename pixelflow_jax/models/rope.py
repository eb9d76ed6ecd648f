"""2D rotary position embedding: half of head_dim encodes the column, the other half the row."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rope_table(
    positions: Float[np.ndarray, "n 2"], head_dim: int, theta: float = 10000.0
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
    """Return (cos, sin) in float64 for positions (row, column).

    The first half of head_dim encodes the column, the second half the row. Within a half, frequency i is
    theta^(-2i / (head_dim/2)), repeated for the pair (2i, 2i + 1). head_dim must be divisible by 4.
    """
    half = head_dim // 2
    frequencies = theta ** (-np.arange(0, half, 2) / half)
    column = np.repeat(np.outer(positions[:, 1], frequencies), 2, axis=1)
    row = np.repeat(np.outer(positions[:, 0], frequencies), 2, axis=1)
    angles = np.concatenate([column, row], axis=1)
    return np.cos(angles), np.sin(angles)


@jax.custom_vjp
def apply_rope(
    x: Float[Array, "rows n heads d"], cos: Float[Array, "n d"], sin: Float[Array, "n d"]
) -> Float[Array, "rows n heads d"]:
    """Rotate each pair (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin), in at least float32.

    cos and sin are constants with two equal entries per pair, as from `rope_table`.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    even = np.arange(x.shape[-1]) % 2 == 0
    # Rolls, in x's dtype: a separate axis for the pairs would fill TPU tiles badly
    turned = jnp.where(even, -jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
    cos, sin = (jnp.asarray(table, dtype)[..., None, :] for table in (cos, sin))
    return (x.astype(dtype) * cos + turned.astype(dtype) * sin).astype(x.dtype)


def _rotate_back(tables, grad):
    cos, sin = tables
    return apply_rope(grad, cos, -sin), None, None


# The transpose of a rotation is its inverse: the backward pass needs only the tables.
apply_rope.defvjp(lambda x, cos, sin: (apply_rope(x, cos, sin), (cos, sin)), _rotate_back)
