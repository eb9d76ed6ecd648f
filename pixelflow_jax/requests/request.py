"""What a user asks `sample` for: one frozen `Request` for every kind of input.

The command line, the Python face, the demo and the settings in a PNG file all fill a `Request`, and one
set of checks reads their values: text, Python's own values, numpy's, or JSON of unknown origin.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pixelflow_jax.common import UserError, cache, cli, sentence
from pixelflow_jax.common.config_keys import BOUNDS, CHOICES, check
from pixelflow_jax.requests.layouts import LAYOUTS
from pixelflow_jax.sampling.generate import png_settings

BATCH, MAX_BATCH = 25, 256  # images at a time: by default, and the most that a PNG file may ask for
LABEL = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^",]*?))\s*(,|$)')  # an entry of a list of classes
# Sources of a setting: the command line only, if it concerns files, hosts and devices; also Python; or
# also a PNG file's settings, which are not trusted: no paths.
COMMAND, PYTHON, PNG = range(3)
AT_ONCE, NUMBERS, NUM_PNG, TIMES = "[1, 65536]", "[0, 2147483647]", "[0, 10000000]", "[0, 1000]"
# Starts other than the noise of a seed, and the settings that do nothing beside each
WITHOUT_EFFECT = {
    "init_image": (),
    "from_noise": ("first_image", "seed"),
    "interpolate": ("first_image", "seed"),
    "invert": ("first_image", "seed", "num_images", "num_png", "save_stages", "layout", "context"),
}
STARTS = tuple(WITHOUT_EFFECT)
IMAGE_STARTS = ("from_stage", "strength", "resample")  # numbers that go with an image to start from


def labels(text: str) -> tuple[int | str, ...]:
    """Read numbers and names of classes separated by commas; quotes make a name of anything.

    Raises ValueError if an entry is empty, or a quote is not closed.
    """
    found, place, more = [], 0, ","
    while more and (match := LABEL.match(text, place)):
        quoted, bare, more = match.groups()
        name = bare if quoted is None else quoted.replace('""', '"')
        if not name:
            break
        is_number = quoted is None and re.fullmatch(r"-?\d{1,18}", bare)
        found.append(int(name) if is_number else name)
        place = match.end()
    else:
        if not more:
            return tuple(found)
    raise ValueError(f"expected {CLASSES}, got {text!r}")


def as_flag(asked: Sequence[int | str]) -> str:
    """Write numbers and names of classes as `labels` reads them; a string stays a name."""
    return ",".join('"{}"'.format(x.replace('"', '""')) if isinstance(x, str) else str(x) for x in asked)


def _plain(value: Any) -> Any:
    """Return a path, and a value of numpy's or JAX's, as Python's own."""
    if isinstance(value, np.floating):
        return float(str(value))  # the decimal that a float32 was typed as
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    value = value.tolist() if hasattr(value, "tolist") else value
    if type(value) is int and abs(value) >= 2**63:
        raise OverflowError("a number that is too large")  # some are too long to be shown
    return value


def _read(value: Any, convert: Callable[[Any], Any], types: Any, split: Any = None) -> Any:
    """Return a value as Python's own: a tuple of any number where `split` takes a text apart.

    Raises TypeError, ValueError, OverflowError if it is not of these types, or there is none.
    """
    if split is not None:
        value = split(value) if isinstance(value, str) else _plain(value)
        several = value if isinstance(value, (list, tuple, range)) else [value]
        if not several:
            raise ValueError
        return tuple(_read(one, convert, types) for one in several)
    value = value if types is object else _plain(value)
    if not isinstance(value, types) or isinstance(value, bool) and types is not bool:
        raise TypeError
    return convert(value)


CLASSES = "numbers or names of classes separated by commas (a name with a comma in quotes)"
COMMAS, SAME = (lambda text: text.split(",")), (lambda value: value)
Text, Whole, Number, Images = str | None, int | None, float | None, Any
Texts, Wholes, Numbers = tuple[str, ...] | None, tuple[int, ...] | None, tuple[float, ...] | None
Labels = tuple[int | str, ...] | None
# Of each type: what to give, for errors, and the arguments of _read
KINDS: dict[Any, tuple[str, tuple]] = {
    str: ("a text", (str, str)),
    Text: ("a text", (str, str)),
    bool: ("true or false", (bool, bool)),
    Whole: ("a whole number", (int, (int, str))),
    Number: ("a number", (float, (float, int, str))),
    Texts: ("a text, or several", (str, str, lambda text: [text])),
    Wholes: ("whole numbers separated by commas", (int, (int, str), COMMAS)),
    Numbers: ("numbers separated by commas", (float, (float, int, str), COMMAS)),
    Labels: (CLASSES, (SAME, (int, str), labels)),
    Images: ("a path or images", (SAME, object)),  # starts.read_pictures checks pixels
}


def _flag(source: int, help: str, interval=None, choices=(), default: Any = None) -> Any:
    """Declare a setting. Keys of config.sample bring their interval or choices."""
    known = dict(source=source, help=help, interval=interval, choices=choices)
    return dataclasses.field(default=default, metadata=known)


@dataclasses.dataclass(frozen=True)
class Request:
    """A user's settings; None stands for the default or the value in the checkpoint's config.

    Values from any source are converted to their type: a list becomes a tuple, text a number. Raises
    UserError for invalid values, and for settings that exclude each other.
    """

    checkpoint: str = _flag(
        COMMAND, "workdir of a run, or a folder that convert wrote", default=dataclasses.MISSING
    )
    out: Text = _flag(COMMAND, "folder to write")
    from_png: Text = _flag(PYTHON, "picture of `sample` or the demo to repeat; other flags change it")
    labels: Labels = _flag(PNG, "classes, used cyclically: 0,1 or cat,dog (default: all trained ones)")
    negative_labels: Labels = _flag(PNG, "classes to steer away from (default: the null class)")
    prompt: Texts = _flag(PNG, "what to show (text models); may be given several times")
    prompts_file: Text = _flag(
        PYTHON, 'file with a prompt per line, or .jsonl with a "prompt" each; or folder of .txt'
    )
    layout: Text = _flag(
        COMMAND, "also write OUT/geneval or OUT/dpg, as those scorers read", None, LAYOUTS
    )
    text_encoder: Text = _flag(PYTHON, "T5 folder or hub id (default: Flan-T5, or the model's own)")
    negative_prompt: Text = _flag(PNG, "a text to steer away from (default: the empty text)")
    num_images: Whole = _flag(PNG, "how many (default: one per label or prompt, or the config's)")
    first_image: Whole = _flag(PNG, "number of the first image (default: 0); continues a set", NUMBERS)
    batch_size: Whole = _flag(PNG, f"images at a time per process (default: up to {BATCH})", AT_ONCE)
    context: Whole = _flag(COMMAND, "devices that share each image, if large (default: 1)", AT_ONCE)
    seed: Whole = _flag(PNG, "default: 0", BOUNDS["seed"])
    ema: Number = _flag(PNG, "decay of the average to use; 0 = the raw parameters")
    lora: Text = _flag(COMMAND, "workdir of adapters that were trained on this checkpoint")
    lora_scale: Number = _flag(COMMAND, "their weight (default: 1)", "[-100, 100]")
    height: Whole = _flag(PNG, "in pixels (default: as trained)")
    width: Whole = _flag(PNG, "in pixels (default: as trained)")
    dtype: Text = _flag(PNG, "of the computation (default: as trained)", None, CHOICES["dtype"])
    solver: Text = _flag(PNG, "default: the config's, as for all below")
    step_control: Text = _flag(PNG, "what sets the steps (auto: by solver)")
    rtol: Number = _flag(PNG, "relative tolerance, where the error sets the steps")
    atol: Number = _flag(PNG, "absolute tolerance")
    num_steps: Wholes = _flag(PNG, "steps per stage: 10, or 10,10,10,10 with one each")
    grid: Text = _flag(PNG, "spacing of the steps; reference: the official grid")
    shift: Number = _flag(PNG, "above 1: more steps near the noise")
    guidance_scale: Number = _flag(PNG, "weight of the last stage; 0 or less: no guidance")
    guidance_schedule: Text = _flag(PNG, "weight over the stages")
    guidance_interval: Numbers = _flag(PNG, "such as 0.2,0.8, on the way from noise to data")
    init_image: Images = _flag(PYTHON, "an image, or a folder of images, to start from")
    from_stage: Whole = _flag(PYTHON, "with --init_image: the stage to start at (default: the last)")
    strength: Number = _flag(PYTHON, "share of that stage to run (default: 1)")
    mask: Images = _flag(
        PYTHON, "with --init_image: white is drawn anew, black is kept (stage: from the first)"
    )
    resample: Whole = _flag(
        PYTHON, "with --mask: repeat each step, so that the new part fits better (default: 0)", TIMES
    )
    invert: Text = _flag(COMMAND, "an image, or a folder of images: writes the noise they come from")
    from_noise: Text = _flag(PYTHON, "noise.npz that --invert wrote")
    interpolate: Wholes = _flag(PYTHON, "two seeds, such as 3,4", BOUNDS["seed"])
    save_stages: bool = _flag(
        COMMAND, "also write stages/000000.png ...: stages side by side", default=False
    )
    num_png: Whole = _flag(COMMAND, "images to write as PNG files (default: see above)", NUM_PNG)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                object.__setattr__(self, field.name, _fit(field, value))
        given = self.given()
        if (self.first_image or 0) + (self.num_images or 1) > 2**31:
            raise UserError(f"--first_image must lie in 0..2^31-1, got {self.first_image}")
        begun = [name for name in STARTS if name in given]
        if len(begun) > 1:
            raise UserError(f"--{begun[0]} and --{begun[1]} exclude each other")
        for name in WITHOUT_EFFECT[begun[0]] if begun else ():
            if name in given:
                raise UserError(f"--{name} does nothing with --{begun[0]}; leave it out")
        if self.init_image is None and given.keys() & {"from_stage", "strength", "mask"}:
            raise UserError("--from_stage, --strength and --mask go with --init_image")
        if self.lora is None and self.lora_scale is not None:
            raise UserError("--lora_scale goes with --lora")
        if self.mask is None and self.resample is not None:
            raise UserError("--resample goes with --mask")
        if self.interpolate is not None and len(self.interpolate) != 2:
            raise UserError(f"--interpolate needs two seeds, got {len(self.interpolate)}")

    def given(self) -> dict[str, Any]:
        """Return the settings that were given, by name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x for name, x in found.items() if x is not None and x is not False}


SETTINGS = {field.name: field for field in dataclasses.fields(Request)}
# Settings that replace a key of config.sample
FROM_CONFIG = [
    name for name in SETTINGS if f"sample.{name}" in BOUNDS | CHOICES and name != "num_images"
]
FROM_PYTHON, FROM_PNG = (
    {name for name, field in SETTINGS.items() if field.metadata["source"] >= least}
    for least in (PYTHON, PNG)
)


def _fit(field: dataclasses.Field, value: Any) -> Any:
    """Return a value as its field's type. Raises UserError, with the flag, if it cannot be."""
    flag, (expected, how), known = f"--{field.name}", KINDS[field.type], field.metadata
    try:
        found = _read(value, *how)
    except OverflowError as error:
        raise UserError(f"{flag}: expected {expected}, got {error}") from None
    except (TypeError, ValueError):
        got = sentence(ValueError(repr(value)), 200)
        raise UserError(f"{flag}: expected {expected}, got {got}") from None
    interval = known["interval"] or BOUNDS.get(f"sample.{field.name}")
    return check(flag, found, interval, _choices(field), field.name not in cli.WORDS)


def _choices(field: dataclasses.Field) -> Sequence[str]:
    return field.metadata["choices"] or CHOICES.get(f"sample.{field.name}", ())


def fill(**given: Any) -> Request:
    """Return the request of these settings; None stands for one that is not given.

    A picture named by `from_png` brings its own settings, which those given replace. Raises UserError as
    `Request`, and for a picture without settings that fit.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "from_png" in given:
        path = Request("", from_png=given["from_png"]).from_png
        given = _of_png(path, given) | given
    return Request(**given)


def _of_png(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a PNG file brings along; it may come from anywhere."""
    kept, found = png_settings(path), {}
    begun, files = kept.get("start"), {}
    if isinstance(begun, dict) and "init_image" in begun:
        files = {name: given.get(name) for name in ("init_image", "mask") if name in begun}
        if any(value is None for value in files.values()):
            flags = " ".join(f"--{name}=FILE" for name in files)
            raise UserError(
                f"--from_png={path} began from init_image, which it does not carry: add {flags}"
            )
        found = {name: begun[name] for name in IMAGE_STARTS if name in begun and name not in given}
    elif begun is not None:
        raise UserError(
            f"--from_png={path} began from {begun}, not from a seed alone: it needs that image "
            f"or noise, which a picture does not carry; repeat the request that made it"
        )
    idle = {name for start in STARTS if start in given for name in WITHOUT_EFFECT[start]}
    idle |= {"prompt"} if "prompts_file" in given else set()
    for name in FROM_PNG - given.keys() - idle:
        if (value := kept.get("prompts" if name == "prompt" else name)) is not None:
            found[name] = value[:1] if name == "prompt" and isinstance(value, list) else value
    if not (isinstance(size := found.get("batch_size"), int) and size <= MAX_BATCH):
        found.pop("batch_size", None)
    try:
        Request("", **found, **files)
    except UserError as error:
        raise UserError(f"--from_png={path} carries settings that do not fit: {error}") from None
    return found


def parser(doc: str) -> argparse.ArgumentParser:
    """Return the parser of the flags of `sample`, one per setting; values stay text."""
    result = cli.parser(doc)
    for name, field in SETTINGS.items():
        help, choices = field.metadata["help"], _choices(field)
        if field.type is bool:
            result.add_argument(f"--{name}", action="store_true", help=help)
            continue
        result.add_argument(
            f"--{name}",
            action="append" if field.type == Texts else "store",
            required=name in ("checkpoint", "out"),
            metavar="{" + ",".join(choices) + "}" if choices else None,
            help=help,
        )
    return result


def parse(doc: str, argv: Sequence[str]) -> Request:
    """Return the request of command-line flags. Raises UserError as `fill`."""
    given = vars(parser(doc).parse_args(argv))
    del given[cache.FLAG]  # cli.run has seen it
    return fill(**given)
