"""What `sample` was asked for: its flags, and the sampler, start and labels that they describe."""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pixelflow_jax import __version__
from pixelflow_jax.cascade.images import UINT8_RULE
from pixelflow_jax.common import arrays, cli, files, numerics
from pixelflow_jax.common.errors import UserError
from pixelflow_jax.requests.conditions import Conditions, forget_encoder, labels, read_conditions
from pixelflow_jax.requests.layouts import LAYOUTS
from pixelflow_jax.sampling import grids, guidance, solvers, starts
from pixelflow_jax.sampling.generate import build_sampler, fit_image, png_settings
from pixelflow_jax.sampling.sampler import Noise, Sampler
from pixelflow_jax.training.checkpoints import load_params

# Flags that replace a key of config.sample; without them the checkpoint's own config decides.
FROM_CONFIG = (
    *("solver", "step_control", "rtol", "atol", "num_steps", "grid", "shift"),
    *("guidance_scale", "guidance_schedule", "guidance_interval"),
)
BATCH, MAX_BATCH = 25, 256  # images at a time, if nobody says otherwise; and at most, if a picture does
MOST_IMAGES, MOST_AT_ONCE, MOST_STEPS = 10_000_000, 65_536, 10_000
STARTS = ("init_image", "from_noise", "interpolate", "invert")
# Flags that do nothing beside one of those
WITHOUT_EFFECT = {
    "init_image": ("first_image",),
    "from_noise": ("first_image", "seed"),
    "interpolate": ("first_image", "seed"),
    "invert": ("first_image", "seed", "num_images", "num_png", "save_stages", "layout", "context"),
}
PACKAGES = ("jax", "jaxlib", "flax", "diffrax", "numpy")


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags of `sample`."""
    result = cli.parser(doc)
    add = result.add_argument
    add("--checkpoint", required=True, help="workdir of a run, or a folder that convert wrote")
    add("--out", required=True, help="folder to write")
    add("--from_png", help="a picture of `sample` or the demo, to make again; other flags change it")
    add("--labels", type=labels, help="classes, such as 0,1 or cat,dog; in turn (default: all trained)")
    add("--negative_labels", type=labels, help="classes to steer away from (default: the null class)")
    add("--prompt", action="append", help="what to show (text models); may be given several times")
    add("--prompts_file", help='a prompt a line; .jsonl with a "prompt" each; or a folder of .txt')
    add("--layout", choices=LAYOUTS, help="also OUT/geneval or OUT/dpg, as those scorers read them")
    add("--text_encoder", help="T5 folder or hub id (default: Flan-T5, or one in the checkpoint)")
    add("--negative_prompt", help="a text to steer away from (default: the empty text)")
    add("--num_images", type=int, help="how many (default: one a label or prompt; or the config's)")
    add("--first_image", type=int, default=0, help="its number (default: %(default)s); continues a set")
    add("--batch_size", type=int, help=f"images at a time, a process (default: all, up to {BATCH})")
    add("--context", type=int, default=1, help="devices that share each image (for large images)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--ema", type=float, help="decay of the average to use; 0 = the raw parameters")
    add("--height", type=int, help="in pixels (default: as trained)")
    add("--width", type=int, help="in pixels (default: as trained)")
    add("--dtype", choices=("float32", "bfloat16"), help="of computation (default: as trained)")
    add("--solver", choices=solvers.SOLVERS, help="default: the config's, as for all below")
    add("--step_control", choices=solvers.CONTROLS, help="who sets the steps (auto: by solver)")
    add("--rtol", type=float, help="relative tolerance, where the error chooses the steps")
    add("--atol", type=float, help="absolute tolerance")
    add("--num_steps", type=numbers, help="steps a stage: 10, or 10,10,10,10 with one each")
    add("--grid", choices=grids.KINDS, help="where the steps stand; reference: the official grid")
    add("--shift", type=float, help="above 1: more steps near the noise")
    add("--guidance_scale", type=float, help="weight of the last stage; 0 or less: no guidance")
    add("--guidance_schedule", choices=guidance.SCHEDULES, help="weight over the stages")
    add("--guidance_interval", type=floats, help="such as 0.2,0.8, on the way from noise to data")
    add("--init_image", help="an image, or a folder of images, to start from")
    add("--from_stage", type=int, help="with --init_image: the stage to start at (default: the last)")
    add("--strength", type=float, default=1.0, help="share of that stage to run (default: %(default)s)")
    add("--invert", help="an image, or a folder of images: writes the noise they come from")
    add("--from_noise", help="noise.npz that --invert wrote")
    add("--interpolate", type=numbers, help="two seeds, such as 3,4")
    add("--save_stages", action="store_true", help="also stages/000000.png ...: the way, side by side")
    add(
        "--num_png",
        type=int,
        help="images that become PNG files too (default: all up to 1000, else 100)",
    )
    return result


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot be right, whatever the checkpoint."""
    for name, least, most in (
        ("batch_size", 1, MOST_AT_ONCE),
        ("context", 1, MOST_AT_ONCE),
        ("num_images", 1, MOST_IMAGES),
        ("num_png", 0, MOST_IMAGES),
        ("num_steps", 1, MOST_STEPS),
    ):
        value = getattr(args, name)
        for number in value if isinstance(value, tuple) else [value]:
            if number is not None and not least <= number <= most:
                bound = f"at least {least}" if number < least else f"at most {most:,}"
                raise UserError(f"--{name} must be {bound}, got {number}")
    if args.first_image < 0 or args.first_image + (args.num_images or 1) > 2**31:
        raise UserError(f"--first_image must lie in 0..2^31-1, got {args.first_image}")
    for seed in (args.seed, *(args.interpolate or ())):
        if not 0 <= seed < 2**32:
            raise UserError(f"a seed must lie in 0..2^32-1, got {seed}")
    given = [name for name in STARTS if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} exclude each other")
    for name in WITHOUT_EFFECT[given[0]] if given else ():
        if name in args.given:
            raise UserError(f"--{name} does nothing with --{given[0]}; leave it out")
    if args.init_image is None and args.given & {"from_stage", "strength"}:
        raise UserError("--from_stage and --strength go with --init_image")
    if args.interpolate is not None and len(args.interpolate) != 2:
        raise UserError(f"--interpolate needs two seeds, got {len(args.interpolate)}")


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas, for argparse."""
    if not re.fullmatch(r"-?\d{1,18}(,-?\d{1,18})*", text):
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def floats(text: str) -> tuple[float, ...]:
    """Numbers separated by commas, for argparse."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that is ready to run.

    Attributes:
      params: of the network.
      sampler, start: see sampler.py and starts.py.
      conditions: what every image is to show.
      settings: what settings.json says.
      batch_size: images at a time; the last batch is filled up to it, so that there is one program.
    """

    params: dict
    sampler: Sampler
    start: Any
    conditions: Conditions
    settings: dict[str, Any]
    batch_size: int

    def settings_of(self, index: int) -> dict[str, Any]:
        """The settings of one image: what its PNG file carries, for --from_png.

        No paths: who shares a picture does not want to tell them.
        """
        one = {"first_image": self.settings["first_image"] + index, "num_images": 1}
        one["batch_size"] = self.batch_size  # another one may move a last bit
        one = {**self.settings, **self.conditions.described_of(index), **one}
        one["start"] = next(iter(one["start"])) if one["start"] else None
        return _plain({name: x for name, x in one.items() if name not in ("checkpoint", "text_encoder")})


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: parameters, its config, and what else it says of itself."""

    params: dict
    config: ConfigDict
    meta: dict[str, Any]
    sha256: str


def load(checkpoint: epath.PathLike, ema: float | None = None) -> Loaded:
    """Reads a checkpoint for sampling (see `load_params`)."""
    params, config, meta = load_params(checkpoint, ema)
    return Loaded(params, config, meta, params_hash(params))


def prepare(args: argparse.Namespace, loaded: Loaded | None = None) -> Job:
    """Builds what the flags ask for. Raises UserError if that cannot be.

    `loaded` is the checkpoint that they name, where it is in memory already.
    """
    once = loaded is None  # a command: there is no next request
    loaded = loaded or load(args.checkpoint, args.ema)
    params, config, meta = loaded.params, loaded.config.copy_and_resolve_references(), loaded.meta
    sampler = sampler_of(args, config)
    start, described = _start(args, sampler)
    conditions = read_conditions(args, config, start, meta)
    if once:
        forget_encoder()
    settings = {
        "checkpoint": str(files.absolute(args.checkpoint)),
        "checkpoint_sha256": loaded.sha256,
        "step": meta["step"],
        "ema": meta["ema"],
        "height": sampler.height,
        "width": sampler.width,
        "dtype": args.dtype or config.dtype,
        "seed": args.seed,
        "first_image": args.first_image,
        **{name: config.sample[name] for name in FROM_CONFIG},
        "step_control": sampler.control,
        "num_images": len(conditions),
        **conditions.described,
        "start": described,
        "save_stages": args.save_stages,
        "uint8_rule": UINT8_RULE,
        **({"jax_switches": changed} if (changed := numerics.switches()) else {}),
        "versions": {"pixelflow_jax": __version__}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if (
        args.from_png is not None
        and png_settings(args.from_png).get("checkpoint_sha256") != loaded.sha256
    ):
        print(f"warning: {args.from_png} was made with other weights", file=sys.stderr)
    few = 1 << (len(conditions) - 1).bit_length()  # a power of two: a session's requests share programs
    batch_size = args.batch_size or min(BATCH, few)
    check_memory("--batch_size", batch_size, sampler, 4)
    return Job(params, sampler, start, conditions, _plain(settings), batch_size)


# Of a picture's settings, those that are flags and decide what it shows
_FROM_PNG = ("ema", "height", "width", "dtype", "seed", "first_image", "num_images", *FROM_CONFIG)
_FROM_PNG += ("batch_size", "labels", "negative_labels", "prompts", "negative_prompt")


def parse(doc: str, argv: list[str]) -> argparse.Namespace:
    """Parses the flags of `sample`; --from_png stands for those of the picture, which others replace.

    `given` holds the names of those in `argv`.
    """
    args, bare = parser(doc).parse_args(argv), parser(doc)
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    args.given = frozenset(vars(bare.parse_args(argv)))
    if args.from_png is None:
        return args
    kept = png_settings(args.from_png)
    if kept.get("start") is not None:
        raise UserError(
            f"--from_png={args.from_png} began from {kept['start']}, not from a seed alone: it needs "
            f"that image or noise, which a picture does not carry; repeat the request that made it"
        )
    idle = {name for start in STARTS if start in args.given for name in WITHOUT_EFFECT[start]}
    flags = []
    for name in _FROM_PNG:
        value, name = kept.get(name), "prompt" if name == "prompts" else name
        replaced = name in args.given or name in idle
        if value is None or replaced or (name == "prompt" and args.prompts_file is not None):
            continue
        if name == "batch_size" and not (isinstance(value, int) and value <= MAX_BATCH):
            continue  # a picture may come from anywhere
        value = value[:1] if name == "prompt" and isinstance(value, list) else value
        flags.append(f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
    try:
        found = parser(doc).parse_args([*flags, *argv])
    except UserError as error:
        raise UserError(
            f"--from_png={args.from_png} carries settings that do not fit: {error}"
        ) from None
    found.given = args.given
    return found


def sampler_of(args: argparse.Namespace, config: ConfigDict) -> Sampler:
    """The sampler of a checkpoint's config and the flags. Raises UserError if they do not fit."""
    for name in FROM_CONFIG:
        if getattr(args, name) is not None:
            config.sample[name] = getattr(args, name)
    return build_sampler(config, args.height, args.width, args.dtype)


def check_memory(flag: str, count: int, sampler: Sampler, size: int) -> None:
    """Raises UserError if `count` images of `size` bytes a value are more than this machine's memory."""
    needed = count * sampler.height * sampler.width * 3 * size
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{flag}={count}: so many images of {sampler.height}x{sampler.width} at once take "
            f"{needed / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f}"
        )


def params_hash(params: dict) -> str:
    """SHA-256 of parameters: names, shapes and bytes."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _start(args: argparse.Namespace, sampler: Sampler) -> tuple[Any, dict[str, Any] | None]:
    """(start, what settings.json says of it)."""
    if args.interpolate:
        between = starts.BetweenSeeds(args.interpolate, args.num_images or 10)
        return between, {"interpolate": args.interpolate}
    if args.from_noise is not None:
        kept = read_noise(args.from_noise, sampler)
        digest = hashlib.sha256(files.read_bytes(args.from_noise)).hexdigest()
        return starts.FromNoise(kept), {"from_noise": args.from_noise, "sha256": digest}
    if args.init_image is None:
        return starts.FromSeed(args.seed, first=args.first_image), None
    stage = sampler.cascade.num_stages - 1 if args.from_stage is None else args.from_stage
    pixels, place = starts.read_pictures(args.init_image, "init_image")
    before = sampler.stage_size(stage - 1)[:2] if stage > 0 else None
    if all(x.shape[:2] == before for x in pixels):
        fitted = np.stack([fit_image(x, *before) for x in pixels])
    else:
        fitted = np.stack([fit_image(x, sampler.height, sampler.width) for x in pixels])
    start = starts.from_images(sampler, args.seed, fitted, stage, args.strength)
    described = {"init_image": place, "from_stage": stage, "strength": args.strength}
    return start, described | {"sha256": hashlib.sha256(fitted.tobytes()).hexdigest()}


def read_noise(path: str, sampler: Sampler) -> Noise:
    """The noise that --invert wrote. Raises UserError if it does not fit the sampler."""
    stages = sampler.cascade.num_stages
    names = ["start", *(f"block_{stage}" for stage in range(1, stages))]
    parts = []
    for stage, name in enumerate(names):
        part = arrays.read_npz(path, name)
        if part.shape[1:] != sampler.stage_size(stage) or part.dtype != np.float32 or not len(part):
            raise UserError(
                f"--from_noise={path}: {name} is {part.dtype} {part.shape}, this model and size need "
                f"float32 {('N', *sampler.stage_size(stage))}"
            )
        parts.append(part)
    if len({len(part) for part in parts}) > 1:
        raise UserError(f"--from_noise={path}: its arrays are not of as many images each")
    return Noise(parts[0], parts[1:])
