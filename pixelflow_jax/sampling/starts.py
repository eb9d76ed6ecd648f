"""Where a sample starts: noise from a seed, an image at any stage, stored noise, or between two seeds.

A start determines the sampler's noise and the first (stage, tau). It has two methods: `inputs(index)` on
the host returns what the images `index` start from, and `noise(sampler, inputs)` runs on the device.
"""

import dataclasses
import hashlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int, Key, UInt8, UInt32
from PIL import Image

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.paths import stage_ends
from pixelflow_jax.cascade.renoising import step_down
from pixelflow_jax.common import UserError, blame, files, numerics
from pixelflow_jax.data.pixels import decode, is_image, report_left_out
from pixelflow_jax.models.conditioning import Condition
from pixelflow_jax.sampling.inpainting import Given
from pixelflow_jax.sampling.sampler import Noise, Sampler

LEAST_STRENGTH = 1e-5  # below this, no solver step would remain: the image itself


def image_keys(seed: int | UInt32[Array, " b"], index: Int[Array, " b"]) -> Key[Array, " b"]:
    """Return one key per image, from the seed (one for all, or one each) and the image's index only."""
    seeds = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), index.shape)
    return jax.vmap(lambda s, i: jax.random.fold_in(numerics.key(s), i))(seeds, index)


@dataclasses.dataclass(frozen=True)
class FromSeed:
    """White noise at the first stage: an ordinary sample. Image i depends on the seed and i.

    The index of the first image is `first`.
    """

    seed: int
    stage: int = 0
    tau: float = 0.0
    first: int = 0

    def inputs(self, index: Int[np.ndarray, " b"]) -> dict[str, Any]:
        """Return what each image of `index` needs, with the image as the first axis."""
        index = np.asarray(index) + self.first
        # Also the seed, so that another seed uses the same compiled program
        return {"index": index, "seed": np.full(index.shape, self.seed, np.uint32)}

    def noise(self, sampler: Sampler, inputs: dict[str, Any]) -> Noise:
        """Return the noise of these images; `start` is x at (stage, tau)."""
        return sampler.draw_noise(image_keys(inputs.get("seed", self.seed), inputs["index"]))


@dataclasses.dataclass(frozen=True)
class FromImages(FromSeed):
    """Noisy images at a point of a stage (variations), or small images at the next stage (upscaling).

    Attributes:
      images: float [N, h, w, 3] in [-1, 1], used cyclically; at full size, or, for upscaling, at the
        size of the stage before `stage`.
      tau: the point in the stage; 0 keeps the least of the image. Always 0 for upscaling.
      kept: for inpainting, bool [M, h, w, 1], used cyclically: where the images stay as they are.
    """

    images: Float[np.ndarray, "n h w 3"] = dataclasses.field(kw_only=True)
    kept: Bool[np.ndarray, "m h w 1"] | None = dataclasses.field(default=None, kw_only=True)

    def inputs(self, index):
        found = super().inputs(index)
        for name in ("images", "kept"):
            if (values := getattr(self, name)) is not None:
                found[name] = values[found["index"] % len(values)]
        return found

    def digests(self, number: int) -> dict[str, str]:
        """Return the SHA-256 of the given image, and of the mask, from which image `number` is made."""
        given = {"init_image": self.images, "mask": self.kept}
        return {
            name: hashlib.sha256(values[number % len(values)].tobytes()).hexdigest()
            for name, values in given.items()
            if values is not None
        }

    @numerics.pinned()
    def noise(self, sampler, inputs):
        clean, size = inputs["images"], sampler.stage_size(self.stage)
        keys = image_keys(inputs["seed"], inputs["index"])
        draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, self.stage), size))
        noise = draw(keys)
        if clean.shape[1:] == (sampler.height, sampler.width, 3):
            x_start, x_end = stage_ends(sampler.cascade, self.stage, clean, noise)
            x = self.tau * x_end + (1 - self.tau) * x_start
        else:
            start = sampler.cascade.start[self.stage]
            x = start * images.up(clean) + (1 - start) * noise
        given = Given(clean, inputs["kept"], noise, keys) if "kept" in inputs else None
        return super().noise(sampler, inputs)._replace(start=x, given=given)


def read_pictures(value: Any, flag: str) -> tuple[list[UInt8[np.ndarray, "h w 3"]], str]:
    """Return the images of --init_image or --invert as (pixels, path or digest of pixels in memory).

    `value` is an image file or a folder of images; in Python also a Pillow image, an array that `decode`
    accepts, or a list of these. Raises UserError, with the flag, if there are no images, or something is
    not an image.
    """
    place = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if place is not None and epath.Path(place).is_dir():
        names = files.list_files(place)
        report_left_out(place, names)
        value = [epath.Path(place) / name for name in names if is_image(name)]
    several = isinstance(value, (list, tuple)) or place is None and np.ndim(value) == 4
    found = [_read_picture(x, flag) for x in (value if several else [value])]
    if place is None:
        place = f"sha256:{hashlib.sha256(b''.join(x.tobytes() for x in found)).hexdigest()}"
    if not found:
        raise UserError(f"--{flag}={place} holds no images")
    return found, place


def _read_picture(value: Any, flag: str) -> UInt8[np.ndarray, "h w 3"]:
    name = f"{flag} is a {type(value).__name__} that"
    if isinstance(value, (str, os.PathLike)):
        name = f"--{flag}={value}"
        if not epath.Path(value).exists():
            raise UserError(f"{name} does not exist")
        value = files.read_bytes(value)
    elif not isinstance(value, Image.Image):
        value = np.asarray(value)
        value = value * np.uint8(255) if value.dtype == bool else value
    with blame(f"{name} is not an image", OSError):
        return np.asarray(decode(value, opaque=flag == "mask"))


def from_images(
    sampler: Sampler,
    seed: int,
    images: Float[np.ndarray, "n h w 3"],
    stage: int,
    strength: float = 1.0,
    kept: Bool[np.ndarray, "m h w 1"] | None = None,
    first: int = 0,
) -> FromImages:
    """Return a start from images at full size (variations) or at the size of `stage - 1` (upscaling).

    Raises UserError for an invalid stage or strength, images of the wrong size, or a start that keeps
    nothing of the images, or for inpainting with error-controlled steps.

    Args:
      images: in [-1, 1].
      stage: first stage to run: an earlier one changes more of the image.
      strength: share of that stage to run, from LEAST_STRENGTH to 1.
      kept: for inpainting: where images, at full size, stay as they are.
      first: number of the first image that is made.
    """
    stages = sampler.cascade.num_stages
    if not 0 <= stage < stages:
        raise UserError(f"the stage to start from must lie in 0..{stages - 1}, got {stage}")
    if not LEAST_STRENGTH <= strength <= 1:
        raise UserError(f"strength must be at least {LEAST_STRENGTH} and at most 1, got {strength}")
    full, size = (sampler.height, sampler.width), tuple(images.shape[1:3])
    before = sampler.stage_size(stage - 1)[:2] if stage else None
    if size not in (full, before):
        also = f", or {before[0]}x{before[1]} to upscale from stage {stage - 1}" if before else ""
        raise UserError(
            f"the images to start from are {size[0]}x{size[1]}; stage {stage} takes "
            f"{full[0]}x{full[1]}{also}"
        )
    if size != full and strength != 1:
        raise UserError(f"upscaling runs all of stage {stage}: strength must be 1, got {strength}")
    steps = sampler.grid.steps(stages)[stage]
    if sampler.model.intervals and abs(strength * steps - round(strength * steps)) > 1e-6:
        raise UserError(
            f"strength must be a multiple of {1 / steps:g}: a distilled model takes whole steps, here "
            f"{steps}; got {strength}"
        )
    if kept is not None and (sampler.control != "fixed" or size != full):
        raise UserError(
            f"--mask takes images of {full[0]}x{full[1]} and fixed steps: --step_control=fixed"
        )
    if stage == 0 and strength == 1 and kept is None:
        raise UserError("stage 0 at strength 1 is pure noise: nothing of the images would be left")
    pixels = np.asarray(images, np.float32)
    return FromImages(seed, stage, 1 - strength, first, images=pixels, kept=kept)


@dataclasses.dataclass(frozen=True)
class FromNoise:
    """Stored noise, such as that of an inversion, used cyclically."""

    kept: Noise
    stage: int = 0
    tau: float = 0.0

    def inputs(self, index):
        chosen = np.asarray(index) % len(self.kept.start)
        return {"noise": jax.tree.map(lambda x: np.asarray(x)[chosen], self.kept)}

    def noise(self, sampler, inputs):
        return inputs["noise"]


@dataclasses.dataclass(frozen=True)
class BetweenSeeds:
    """Interpolation from one seed's noise to another's in `count` images, repeated.

    The weights are cos and sin of an angle from 0 to 90 degrees, so that every mixture has the
    distribution of a single draw.
    """

    seeds: tuple[int, int]
    count: int
    stage: int = 0
    tau: float = 0.0

    def inputs(self, index):
        place = np.asarray(index) % self.count
        angle = place / max(self.count - 1, 1) * (np.pi / 2)
        return {
            "index": np.asarray(index) // self.count,
            "weights": np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32),
        }

    def noise(self, sampler, inputs):
        first, second = (sampler.draw_noise(image_keys(s, inputs["index"])) for s in self.seeds)
        a, b = (inputs["weights"][:, i, None, None, None] for i in range(2))
        return jax.tree.map(lambda x, y: a * x + b * y, first, second)


def invert(
    sampler: Sampler,
    params: dict,
    image: Float[Array, "b h w c"],
    condition: Condition,
    null_condition: Condition,
) -> Noise:
    """Return the noise from which `sampler` generates these images, in [-1, 1]; call it under jit.

    Each stage's ODE is integrated backwards. Between stages, x = alpha Up(y) + beta n. Because Down(n) =
    0, y is Down(x) / alpha, and the rest is the block noise n, which is kept (see cascade/renoising.py).
    """
    x, blocks = image, []
    for stage in reversed(range(sampler.cascade.num_stages)):
        grid = sampler.stage_grid(stage).backwards()
        x, _ = sampler.solve_stage(params, x, grid, condition, null_condition)
        if stage:
            x, block = step_down(sampler.cascade, stage, x)
            blocks.append(block)
    return Noise(jnp.asarray(x), blocks[::-1])
