"""Turn a request and a checkpoint into a job: sampler, start and conditions."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import sys
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Int, UInt8
from ml_collections import ConfigDict

from pixelflow_jax import __version__
from pixelflow_jax.cascade.images import UINT8_RULE
from pixelflow_jax.common import UserError, arrays, files, numerics
from pixelflow_jax.foreign.released import is_hub_id
from pixelflow_jax.requests.conditions import Conditions, forget_encoder, read_conditions
from pixelflow_jax.requests.request import BATCH, FROM_CONFIG, IMAGE_STARTS, Request
from pixelflow_jax.sampling import starts
from pixelflow_jax.sampling.generate import build_sampler, fit_image, fit_mask, png_settings
from pixelflow_jax.sampling.sampler import Noise, Sampler
from pixelflow_jax.training.adapters import load_with_adapters
from pixelflow_jax.training.checkpoints import load_params
from pixelflow_jax.training.fingerprints import params_hash

PACKAGES = ("jax", "jaxlib", "flax", "diffrax", "numpy")


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that is ready to run; `settings` are the contents of settings.json.

    The last batch of images is padded to `batch_size`, so that there is only one program.
    """

    params: dict
    sampler: Sampler
    start: Any  # see sampling/starts.py
    conditions: Conditions
    settings: dict[str, Any]
    batch_size: int

    def settings_of(self, index: int) -> dict[str, Any]:
        """Return the settings of one image, which its PNG file carries for --from_png.

        They contain no paths, which people who share an image do not want to reveal.
        """
        one = {"first_image": self.settings["first_image"] + index, "num_images": 1}
        one["batch_size"] = self.batch_size  # another batch size may change a last bit
        one = {**self.settings, **self.conditions.described_of(index), **one}
        start = one["start"]
        if isinstance(self.start, starts.FromImages):
            one["start"] = {name: start[name] for name in IMAGE_STARTS if name in start}
            one["start"] |= self.start.digests(one["first_image"])
        else:
            one["start"] = next(iter(start)) if start else None
        return _plain({name: x for name, x in one.items() if name not in ("checkpoint", "text_encoder")})


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: its parameters, config, metadata and a digest of the parameters."""

    params: dict
    config: ConfigDict
    meta: dict[str, Any]
    sha256: str


def load(
    checkpoint: epath.PathLike,
    ema: float | None = None,
    lora: epath.PathLike | None = None,
    lora_scale: float | None = None,
) -> Loaded:
    """Read a checkpoint for sampling (see `load_params`), with a run's adapters if `lora` names it."""
    if lora is None:
        params, config, meta = load_params(checkpoint, ema)
    else:
        scale = 1.0 if lora_scale is None else lora_scale
        params, config, meta = load_with_adapters(checkpoint, lora, scale, ema)
    return Loaded(params, config, meta, params_hash(params))


def prepare(request: Request, loaded: Loaded | None = None) -> Job:
    """Return the job of a request, whose checkpoint may already be in memory.

    Raises UserError if the request does not fit the checkpoint.
    """
    once = loaded is None  # a command: there is no next request
    asked = request.checkpoint, request.ema, request.lora, request.lora_scale
    loaded = loaded or load(*asked)
    config, meta = loaded.config.copy_and_resolve_references(), loaded.meta
    sampler = sampler_of(request, config)
    _check_negative(request, sampler)
    start, described = _start(request, sampler)
    conditions = read_conditions(request, config, start, meta)
    if once:
        forget_encoder()
    name = request.checkpoint
    settings = {
        "checkpoint": name if is_hub_id(name) else str(files.absolute(name)),
        "checkpoint_sha256": loaded.sha256,
        "step": meta["step"],
        "ema": meta["ema"],
        "height": sampler.height,
        "width": sampler.width,
        "dtype": request.dtype or config.dtype,
        "seed": request.seed or 0,
        "first_image": request.first_image or 0,
        **{name: config.sample[name] for name in FROM_CONFIG},
        "step_control": sampler.control,
        "num_images": len(conditions),
        **conditions.described,
        "start": described,
        "save_stages": request.save_stages,
        "uint8_rule": UINT8_RULE,
        **({"jax_switches": changed} if (changed := numerics.switches()) else {}),
        "versions": {"pixelflow_jax": __version__}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if request.from_png:
        _compare(request, png_settings(request.from_png), loaded.sha256, start)
    few = 1 << (len(conditions) - 1).bit_length()  # a power of two: a session's requests share programs
    batch_size = request.batch_size or min(BATCH, few)
    check_memory("--batch_size", batch_size, sampler, 4)
    return Job(loaded.params, sampler, start, conditions, _plain(settings), batch_size)


def _compare(request: Request, kept: dict[str, Any], sha256: str, start: Any) -> None:
    """Warn of other weights than a picture's. Raises UserError for another image or mask than its."""
    if kept.get("checkpoint_sha256") != sha256:
        print(f"warning: {request.from_png} was made with other weights", file=sys.stderr)
    if isinstance(kept.get("start"), dict):
        for name, digest in start.digests(request.first_image or 0).items():
            if kept["start"].get(name) != digest:
                raise UserError(f"--{name} is not what {request.from_png} began from")


def sampler_of(request: Request, config: ConfigDict) -> Sampler:
    """Return the sampler of a checkpoint's config and a request, which changes `config.sample`.

    Raises UserError if they do not fit.
    """
    for name in FROM_CONFIG:
        if (value := getattr(request, name)) is not None:
            config.sample[name] = value
    sampler = build_sampler(config, request.height, request.width, request.dtype)
    return dataclasses.replace(sampler, resample=request.resample or 0)


def _check_negative(request: Request, sampler: Sampler) -> None:
    """Raise UserError if what to steer away from can have no effect."""
    if {*sampler.guidance.weights(sampler.cascade.num_stages)} == {1.0}:
        for name in ("negative_labels", "negative_prompt"):
            if getattr(request, name):
                own = "a distilled model" if sampler.model.intervals else "a guidance_scale of 0 or 1"
                raise UserError(f"--{name} does nothing with {own}; leave it out")


class NotFinite(UserError):
    """An image is not finite; the message says which one, and what to try."""


def check_finite(finite: Bool[np.ndarray, " b"], index: Int[np.ndarray, " b"]) -> None:
    """Raise NotFinite unless all of the images `index` are finite."""
    if not finite.all():
        raise NotFinite(
            f"image {index[np.argmin(finite)]} is not finite: try --dtype=float32, another --solver or "
            f"more --num_steps; if nothing helps, the checkpoint's weights are broken"
        )


def check_memory(flag: str, count: int, sampler: Sampler, size: int) -> None:
    """Raise UserError if `count` images of `size` bytes per value exceed this machine's memory."""
    needed = count * sampler.height * sampler.width * 3 * size
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{flag}={count}: that many images of {sampler.height}x{sampler.width} at once need "
            f"{needed / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f}"
        )


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _start(request: Request, sampler: Sampler) -> tuple[Any, dict[str, Any] | None]:
    """Return (start, what settings.json says of it)."""
    seed = request.seed or 0
    if request.interpolate:
        between = starts.BetweenSeeds(request.interpolate, request.num_images or 10)
        return between, {"interpolate": request.interpolate}
    if request.from_noise is not None:
        kept = read_noise(request.from_noise, sampler)
        digest = hashlib.sha256(files.read_bytes(request.from_noise)).hexdigest()
        return starts.FromNoise(kept), {"from_noise": request.from_noise, "sha256": digest}
    if request.init_image is None:
        return starts.FromSeed(seed, first=request.first_image or 0), None
    usual = 0 if request.mask is not None else sampler.cascade.num_stages - 1
    stage = usual if request.from_stage is None else request.from_stage
    strength = 1.0 if request.strength is None else request.strength
    pixels, place = starts.read_pictures(request.init_image, "init_image")
    before = sampler.stage_size(stage - 1)[:2] if stage > 0 else None
    size = before if all(x.shape[:2] == before for x in pixels) else (sampler.height, sampler.width)
    fitted, kept = np.stack([fit_image(x, *size) for x in pixels]), None
    described = {"init_image": place, "from_stage": stage, "strength": strength}
    described["sha256"] = hashlib.sha256(fitted.tobytes()).hexdigest()
    if request.mask is not None:
        kept, described["mask"] = _read_masks(request.mask, pixels, *size)
        described["mask_sha256"] = hashlib.sha256(kept.tobytes()).hexdigest()
        described["resample"] = sampler.resample
    first = request.first_image or 0
    return starts.from_images(sampler, seed, fitted, stage, strength, kept, first), described


def _read_masks(
    value: Any, pictures: list[UInt8[np.ndarray, "h w 3"]], height: int, width: int
) -> tuple[Bool[np.ndarray, "m h w 1"], str]:
    """Return (where each of these pictures is kept, at this size; path or digest) from --mask.

    White is drawn anew, black is kept; in Python, a mask may also be bool [H, W], True where it is drawn
    anew. There is one mask for all pictures, or one each. Raises UserError as `read_pictures`; also for
    transparent masks, another number or size than the pictures have, and masks of one colour.
    """
    masks, place = starts.read_pictures(value, "mask")
    if len(masks) not in (1, len(pictures)):
        raise UserError(f"--mask={place} holds {len(masks)} masks for {len(pictures)} images")
    for number, picture in enumerate(pictures):
        mask = masks[number % len(masks)]
        if mask.shape != picture.shape:
            sizes = "{}x{}, its image {}x{}".format(*mask.shape[:2], *picture.shape[:2])
            raise UserError(f"--mask={place} is {sizes}: give both the same size")
    kept = np.stack([fit_mask(x, height, width) for x in masks])
    for one in kept:
        if one.all() or not one.any():
            colour, why = ("black", "nothing is drawn") if one.all() else ("white", "nothing is kept")
            raise UserError(f"--mask={place} is {colour} everywhere at {height}x{width}: {why}")
    return kept, place


def read_noise(path: str, sampler: Sampler) -> Noise:
    """Read the noise that --invert wrote. Raises UserError if it does not fit the sampler."""
    parts = []
    for stage in range(sampler.cascade.num_stages):
        name, size = f"block_{stage}" if stage else "start", sampler.stage_size(stage)
        part = arrays.read_npz(path, name)
        if part.shape[1:] != size or part.dtype != np.float32 or not len(part):
            raise UserError(
                f"--from_noise={path}: {name} is {part.dtype} {part.shape}, this model and size need "
                f"float32 {('N', *size)}"
            )
        parts.append(part)
    if len({len(part) for part in parts}) > 1:
        raise UserError(f"--from_noise={path}: its arrays do not hold the same number of images")
    return Noise(parts[0], parts[1:])
