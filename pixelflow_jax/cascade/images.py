"""Images on the device: down, up, patches, and between uint8 and [-1, 1]. Layout [..., H, W, C]."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

UINT8_RULE = "round(255 * clip(x / 2 + 0.5, 0, 1))"


def down(x: Float[Array, "*b h w c"], times: int = 1) -> Float[Array, "*b h2 w2 c"]:
    """Halves height and width `times` times by the mean over 2x2 blocks (paper, eq. 4 and 5)."""
    for _ in range(times):
        *batch, height, width, channels = x.shape
        x = x.reshape(*batch, height // 2, 2, width // 2, 2, channels).mean(axis=(-4, -2))
    return x


def up(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h2 w2 c"]:
    """Doubles height and width, each pixel becoming a 2x2 block (nearest neighbour)."""
    *batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[..., :, None, :, None, :], (*batch, height, 2, width, 2, channels))
    return x.reshape(*batch, 2 * height, 2 * width, channels)


def patchify(x: Float[Array, "*b h w c"], patch_size: int) -> Float[Array, "*b n d"]:
    """Cuts images into tokens of patch_size^2 * C values, ordered (row, column, channel)."""
    *batch, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(*batch, height // p, p, width // p, p, channels)
    return jnp.swapaxes(x, -4, -3).reshape(*batch, (height // p) * (width // p), p * p * channels)


def unpatchify(
    tokens: Float[Array, "*b n d"], height: int, width: int, patch_size: int
) -> Float[Array, "*b h w c"]:
    """The inverse of `patchify`; height and width in pixels."""
    *batch, _, dim = tokens.shape
    p = patch_size
    x = tokens.reshape(*batch, height // p, width // p, p, p, dim // (p * p))
    return jnp.swapaxes(x, -4, -3).reshape(*batch, height, width, dim // (p * p))


def from_uint8(x: UInt8[Array | np.ndarray, "*b h w c"]) -> Float[Array | np.ndarray, "*b h w c"]:
    """Pixels 0..255 to float32 in [-1, 1]."""
    return x.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: Float[Array, "*b h w c"]) -> UInt8[Array, "*b h w c"]:
    """[-1, 1] to pixels by UINT8_RULE, the official evaluation's."""
    return jnp.round(255 * jnp.clip(x / 2 + 0.5, 0, 1)).astype(jnp.uint8)
