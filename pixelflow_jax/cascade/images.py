"""Operations on images [..., H, W, C]: down- and upsampling, patches, conversion from and to uint8."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

UINT8_RULE = "round(255 * clip(x / 2 + 0.5, 0, 1))"


def down(x: Float[Array, "*b h w c"], times: int = 1) -> Float[Array, "*b h2 w2 c"]:
    """Halve height and width `times` times, by the mean over 2x2 blocks (paper, eq. 4 and 5)."""
    for _ in range(times):
        *batch, height, width, channels = x.shape
        x = x.reshape(*batch, height // 2, 2, width // 2, 2, channels).mean(axis=(-4, -2))
    return x


def up(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h2 w2 c"]:
    """Double height and width: each pixel becomes a 2x2 block (nearest neighbor)."""
    *batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[..., :, None, :, None, :], (*batch, height, 2, width, 2, channels))
    return x.reshape(*batch, 2 * height, 2 * width, channels)


def patchify(x: Float[Array, "*b h w c"], patch_size: int) -> Float[Array, "*b n d"]:
    """Cut images into tokens of patch_size^2 * C values, in the order (row, column, channel)."""
    *batch, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(*batch, height // p, p, width // p, p, channels)
    return jnp.swapaxes(x, -4, -3).reshape(*batch, (height // p) * (width // p), p * p * channels)


def unpatchify(
    tokens: Float[Array, "*b n d"], height: int, width: int, patch_size: int
) -> Float[Array, "*b h w c"]:
    """Invert `patchify`; height and width in pixels."""
    *batch, _, dim = tokens.shape
    p = patch_size
    x = tokens.reshape(*batch, height // p, width // p, p, p, dim // (p * p))
    return jnp.swapaxes(x, -4, -3).reshape(*batch, height, width, dim // (p * p))


def from_uint8(x: UInt8[Array | np.ndarray, "*b h w c"]) -> Float[Array | np.ndarray, "*b h w c"]:
    """Map pixels 0..255 to float32 in [-1, 1]."""
    return x.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: Float[Array, "*b h w c"]) -> UInt8[Array, "*b h w c"]:
    """Map [-1, 1] to pixels by UINT8_RULE, as in the official evaluation."""
    return jnp.round(255 * jnp.clip(x / 2 + 0.5, 0, 1)).astype(jnp.uint8)
