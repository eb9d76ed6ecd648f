"""From a config and keys to uint8 images, and to PNG files."""

import io
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Int, Key, UInt8
from ml_collections import ConfigDict
from PIL import Image

from pixelflow_jax import files, images
from pixelflow_jax.config import build_cascade, build_model
from pixelflow_jax.sampling.grids import TimeGrid
from pixelflow_jax.sampling.guidance import Guidance
from pixelflow_jax.sampling.sampler import Sampler, class_conditions

GAP, GREY = 2, 64  # between the images of a grid


def build_sampler(
    config: ConfigDict, height: int | None = None, width: int | None = None, dtype: str | None = None
) -> Sampler:
    """The sampler that `config.sample` describes; size and dtype default to the training's."""
    settings = config.sample
    return Sampler(
        build_model(config, dtype),
        build_cascade(config),
        height or config.data.resolution,
        width or config.data.resolution,
        TimeGrid(tuple(settings.num_steps), settings.grid, settings.shift),
        Guidance(settings.guidance_scale, settings.guidance_schedule),
        settings.solver,
    )


def image_keys(seed: int, index: Int[Array, " b"]) -> Key[Array, " b"]:
    """One key an image, from the seed and the image's number alone."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)


def make_generate(
    sampler: Sampler,
) -> Callable[..., tuple[UInt8[Array, "b h w 3"], Bool[Array, " b"]]]:
    """The jitted function (params, keys [B], labels [B]) -> images: the cascade in one program.

    It also returns whether each image is finite, which pixels cannot tell.
    """

    def generate(params, keys, labels):
        conditions = class_conditions(labels, sampler.model.num_classes)
        ends = sampler.sample(params, sampler.draw_noise(keys), *conditions)
        return images.to_uint8(ends[-1]), jnp.isfinite(ends[-1]).all((1, 2, 3))

    return jax.jit(generate)


def save_png(path: epath.PathLike, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes one image."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG")
    files.write_bytes(path, buffer.getvalue())


def save_grid(path: epath.PathLike, pixels: UInt8[np.ndarray, "n h w 3"], limit: int = 100) -> None:
    """Writes up to `limit` images as one picture, ten a row where there are many, enlarged if tiny."""
    pixels = np.asarray(pixels)[:limit]
    scale = max(1, 48 // max(pixels.shape[1:3]))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    pixels = np.pad(pixels, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=GREY)
    count, height, width, _ = pixels.shape
    columns = 10 if count >= 20 else math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * columns, height, width, 3), GREY, np.uint8)
    canvas[:count] = pixels
    canvas = canvas.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    save_png(path, canvas.reshape(rows * height, columns * width, 3))
