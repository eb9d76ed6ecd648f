"""From a config to a compiled function that generates uint8 images, and PNG files."""

import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.packing import CONTEXT
from pixelflow_jax.common import UserError, files
from pixelflow_jax.common.hardware import platform_of
from pixelflow_jax.config import build_cascade, build_model
from pixelflow_jax.data.pixels import decode
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import cast_params, encode_text
from pixelflow_jax.sampling.grids import TimeGrid
from pixelflow_jax.sampling.guidance import Guidance
from pixelflow_jax.sampling.sampler import Sampler
from pixelflow_jax.sampling.starts import FromSeed

GAP, GREY = 2, 64  # gap between the images of a grid, in pixels, and its colour
SETTINGS = "pixelflow_jax"  # key of the PNG text that stores an image's settings
AXIS = "images"  # mesh axis over which a process distributes its images


def build_sampler(
    config: ConfigDict, height: int | None = None, width: int | None = None, dtype: str | None = None
) -> Sampler:
    """Return the sampler of `config.sample`; size and dtype default to those of training."""
    settings = config.sample
    return Sampler(
        build_model(config, dtype),
        build_cascade(config),
        config.data.resolution if height is None else height,
        config.data.resolution if width is None else width,
        TimeGrid(tuple(settings.num_steps), settings.grid, settings.shift),
        Guidance(settings.guidance_scale, settings.guidance_schedule, tuple(settings.guidance_interval)),
        settings.solver,
        settings.rtol,
        settings.atol,
        settings.step_control,
    )


def image_mesh(devices: list, context: int = 1) -> Mesh:
    """Return a mesh that distributes images; `context` devices share each image.

    Raises UserError if `context` does not divide the devices.
    """
    if context < 1 or len(devices) % context:
        raise UserError(f"context={context} does not divide {len(devices)} devices")
    return Mesh(np.array(devices).reshape(-1, context), (AXIS, CONTEXT))


class Generated(NamedTuple):
    """Generated images.

    Attributes:
      pixels: the images.
      finite: whether each image was finite everywhere, which pixels cannot show.
      nfe: network evaluations per image and stage.
      stages: the images at the end of every stage except the last, also as pixels.
    """

    pixels: UInt8[Array, "b h w 3"]
    finite: Bool[Array, " b"]
    nfe: Int[Array, "b stages"]
    stages: list[UInt8[Array, "b hs ws 3"]]


def make_generate(
    sampler: Sampler, start: Any = None, mesh: Mesh | None = None, param_specs: Any = None
) -> Callable[..., Generated]:
    """Return a jitted function (params, inputs, condition, null condition) -> Generated.

    The whole cascade is one program. `inputs` are `start.inputs(index)` of the images. Conditions are
    those of models/conditioning.py, including token ids, such as `class_conditions(labels, 10)`.

    Args:
      start: where images start (starts.py); default: noise from seed 0.
      mesh: devices that each generate a part of the batch; those along an axis `context` share the
        tokens of the same images.
      param_specs: how the parameters are sharded, from `sharding.specs`; default: each device holds all.
    """
    start, model = start or FromSeed(0), sampler.model
    if mesh is not None:
        model = model.clone(platform=platform_of(mesh.devices.flat[0]))
        if param_specs is not None:
            layers = param_specs[sharding.SCANNED]
            model = model.clone(gather_layer=sharding.layer_gather(layers, model.dtype))
        sampler = dataclasses.replace(sampler, model=model, shards=mesh.shape.get(CONTEXT, 1))

    def generate(params, inputs, condition, null_condition) -> Generated:
        if param_specs is not None:
            params = sharding.gather_rest(params, param_specs, model.dtype)
        else:
            params = cast_params(model, params)  # once, not in each layer of each evaluation
        condition = encode_text(sampler.model, params, condition)
        null_condition = encode_text(sampler.model, params, null_condition)
        noise = start.noise(sampler, inputs)
        run = sampler.run(params, noise, condition, null_condition, start.stage, start.tau)
        *stages, last = run.ends
        finite = jnp.isfinite(last).all((1, 2, 3))
        return Generated(images.to_uint8(last), finite, run.nfe, [images.to_uint8(x) for x in stages])

    if mesh is None:
        return jax.jit(generate)
    batch = P(tuple(name for name in mesh.axis_names if name != CONTEXT))
    specs = (P() if param_specs is None else param_specs, batch, batch, batch)
    return jax.jit(jax.shard_map(generate, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False))


def make_stages(sampler: Sampler, start: Any = None) -> Callable[..., Iterator[Generated]]:
    """Return a function like that of `make_generate` on one device, but with one program per stage.

    It yields a `Generated` at the end of each stage, with the evaluations of that stage. The last pixels
    equal those of `make_generate` bit for bit.
    """
    start, first = start or FromSeed(0), (start.stage if start else 0)

    @jax.jit
    def begin(params, inputs, *conditions):
        texts = [encode_text(sampler.model, params, c) for c in conditions]
        return start.noise(sampler, inputs), texts

    @functools.partial(jax.jit, static_argnums=0)
    def advance(stage, params, x, noise, conditions):
        params = cast_params(sampler.model, params)
        x, nfe = sampler.run_stage(params, x, noise, *conditions, stage, first, start.tau)
        return x, Generated(images.to_uint8(x), jnp.isfinite(x).all((1, 2, 3)), nfe[:, None], [])

    def run(params, inputs, condition, null_condition):
        noise, conditions = begin(params, inputs, condition, null_condition)
        x = noise.start
        for stage in range(first, sampler.cascade.num_stages):
            x, end = advance(stage, params, x, noise, conditions)
            yield end

    return run


def read_image(path: epath.PathLike) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels of an image file. Raises OSError if it cannot be read as an image."""
    return np.asarray(decode(files.read_bytes(path)))


def fit_image(
    pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> Float[np.ndarray, "h2 w2 3"]:
    """Return pixels in [-1, 1], center-cropped to the aspect ratio and resized (Lanczos)."""
    return np.asarray(images.from_uint8(_fit(pixels, height, width, Image.Resampling.LANCZOS)))


def fit_mask(pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> Bool[np.ndarray, "h2 w2 1"]:
    """Return where a mask is black (below 128), cropped as `fit_image` does, the nearest pixels."""
    return _fit(pixels, height, width, Image.Resampling.NEAREST).mean(-1, keepdims=True) < 128


def _fit(pixels, height: int, width: int, method: Image.Resampling) -> UInt8[np.ndarray, "h2 w2 3"]:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (width, height), method))


def png_bytes(image: UInt8[np.ndarray, "h w 3"], settings: dict[str, Any] | None = None) -> bytes:
    """Return the contents of a PNG file; `settings` are stored as JSON text under the key SETTINGS."""
    buffer, info = io.BytesIO(), PngInfo()
    if settings is not None:
        info.add_itxt(SETTINGS, json.dumps(settings))
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(
    path: epath.PathLike, image: UInt8[np.ndarray, "h w 3"], settings: dict[str, Any] | None = None
) -> None:
    """Write one image; see `png_bytes`."""
    files.write_bytes(path, png_bytes(image, settings))


def png_settings(path: epath.PathLike) -> dict[str, Any]:
    """Return the settings in a PNG file from `save_png`. Raises UserError if there are none."""
    try:
        with Image.open(io.BytesIO(files.read_bytes(path)), formats=["PNG"]) as image:
            image.load()
            found = json.loads(image.info[SETTINGS])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except KeyError:
        raise UserError(f"{path} carries no settings: it is not an image from `sample`") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a PNG file") from None
    except (OSError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image with settings: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} carries settings of another form")
    return found


def save_strip(path: epath.PathLike, stages: list[UInt8[np.ndarray, "h w 3"]]) -> None:
    """Write one image at the end of each stage, side by side, all enlarged to the size of the last."""
    height = stages[-1].shape[0]
    parts = []
    for image in stages:
        scale = height // image.shape[0]
        image = image.repeat(scale, axis=0).repeat(scale, axis=1)
        parts.append(np.pad(image, ((0, 0), (0, GAP), (0, 0)), constant_values=GREY))
    save_png(path, np.concatenate(parts, axis=1)[:, :-GAP])


def save_grid(path: epath.PathLike, pixels: UInt8[np.ndarray, "n h w 3"], limit: int = 100) -> None:
    """Write up to `limit` images as one grid, ten per row if there are many, enlarged if tiny."""
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
