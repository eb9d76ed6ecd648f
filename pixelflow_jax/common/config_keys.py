"""Valid config keys and values: names, types, bounds. All inputs pass the same checks.

A value may come from a config file, a flag, the JSON of a checkpoint, or a user's program.
"""

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pixelflow_jax.common import UserError, blame, files, sentence
from pixelflow_jax.common.removed import REMOVED

MOST = 2**32  # largest absolute value of any number
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Intervals of numbers, and of each number in a tuple
INTERVALS = {
    "[0, 4294967295]": "seed",
    "[1, 2147483647]": "num_train_steps",  # steps are int32
    "[1, inf)": "batch_size accumulation_steps log_every checkpoint_every keep_checkpoints mesh.context "
    "data.resolution data.max_aspect_ratio data.bucket_unit data.num_threads data.prefetch "
    "profile.first_step",
    "[1, 10000]": "sample.num_steps",
    # larger numbers are a typing error or a damaged file
    "[1, 4096]": "model.num_heads model.head_dim model.depth model.patch_size model.scan_unroll "
    "text.num_layers text.num_heads text.head_dim",
    "[1, 100000]": "text.mlp_dim",
    "[2, inf)": "text.max_length",
    "[0, inf)": "sample_every keep_every data.num_workers profile.num_steps optimizer.warmup_steps "
    "optimizer.clip_norm",
    "[0, 100000]": "model.context_dim",
    "[0, 10000000]": "model.num_classes",
    "[0, 1024]": "lora.rank",
    "[1, 10000000]": "sample.num_images",
    "[0, 100]": "optimizer.learning_rate optimizer.muon_learning_rate optimizer.weight_decay",
    "[0, 1]": "data.label_dropout data.max_broken_share optimizer.eps sample.guidance_interval",
    "[0, 1)": "optimizer.b1 optimizer.b2 ema.decays",
    "(0, 1)": "sample.rtol sample.atol",
    "(0, inf)": "ema.half_lives sample.shift hosts.start_timeout hosts.heartbeat_timeout "
    "hosts.step_timeout",
    "[1, 1000]": "cascade.num_stages",
    "[-1/3, 0)": "cascade.gamma",
    "[-1, inf)": "mesh.data mesh.fsdp",
    "(-inf, inf)": "sample.guidance_scale distill.guidance_scale",
}
BOUNDS = {key: interval for interval, keys in INTERVALS.items() for key in keys.split()}
CHOICES = {
    "dtype": tuple(DTYPES),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "optimizer.weight_decay_on": ("matrices", "all"),
    "data.crop": ("none", "random", "center"),
    # Names of what other rooms implement; tests compare them.
    "model.remat": ("none", "dots", "full", "offload"),
    "model.attention": ("auto", "einsum", "blockwise", "splash", "cudnn"),
    "data.source": tuple(
        "digits captioned_digits idx caption_folder webdataset folder tfds array_record".split()
    ),
    "sample.solver": tuple("euler heun midpoint ralston ab2 bosh3 dopri5 tsit5 dopri8".split()),
    "sample.step_control": ("auto", "fixed", "per_image", "per_batch"),
    "sample.grid": ("uniform", "reference"),
    "sample.guidance_schedule": ("stagewise", "constant", "reference"),
    "distill.guidance_schedule": ("stagewise", "constant", "reference"),
}
PATHS = ("init_from", "distill.teacher", "data.path", "text.cache", "text.encoder")
ENTRIES = {"ema.half_lives": 1.0, "text.words": ""}  # types of entries where the default tuple is empty


def fit(
    values: Any, default: Mapping[str, Any], where: str = "config.", stored: bool = False
) -> dict[str, Any]:
    """Return `values`, a tree like `default`, by full key, as plain Python values of its types.

    With `stored`, for the JSON of a run, missing keys take their default and removed keys are dropped.
    `where` is the prefix of keys in error messages. Raises UserError for an unknown or missing key, or a
    value of the wrong type or out of bounds.
    """
    known = dict(_leaves(default, default, where))
    fitted = {}
    for key, value in _leaves(values, default, where):
        if not (key in REMOVED and stored):
            fitted[key] = fit_value(key, value, _at(known, key, where), where)
    missing = [] if stored else sorted(known.keys() - fitted.keys())
    if missing:
        raise UserError(
            f"{where}{missing[0]} is missing: start from default_config() and change its values"
        )
    return known | fitted


def _leaves(values: Any, default: Mapping, where: str, section: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full key, value) of a tree. Raises UserError if a section is not a mapping."""
    if not isinstance(values, Mapping):
        name = f"{where}{section}".rstrip(".")
        raise UserError(f"{name}={_short(values)}: expected a value like {_short(dict(default))}")
    for name, value in values.items():
        if isinstance(default.get(name), Mapping):
            yield from _leaves(value, default[name], where, f"{section}{name}.")
        elif isinstance(value, Mapping) and name not in default:
            yield from ((f"{section}{name}.{inner}", None) for inner in value or ("",))
        else:
            yield f"{section}{name}", value


def _at(known: Mapping[str, Any], key: str, where: str) -> Any:
    """Return the default of a key. Raises UserError, which suggests a key, if it is unknown."""
    if key in known:
        return known[key]
    if key in REMOVED:
        raise UserError(f"{where}{key} was removed: {REMOVED[key].instead}")
    best = max(known, key=lambda name: _likeness(key, name))
    raise UserError(
        f"{where}{key} is not a key of this version of pixelflow_jax; did you mean config.{best}?"
    )


def _likeness(key: str, known: str) -> float:
    """Return the similarity of a misspelt key to a known one: name (or initials) first, then section."""
    (section, _, name), (other_section, _, other) = key.rpartition("."), known.rpartition(".")
    initials = "".join(word[0] for word in other.split("_"))
    alike = 0.9 if name == initials else difflib.SequenceMatcher(None, name, other).ratio()
    alike += name == other
    return 2 * alike + difflib.SequenceMatcher(None, section, other_section).ratio()


def fit_value(key: str, value: Any, default: Any, where: str = "config.") -> Any:
    """Return a key's value with the type of its default. Raises UserError as `fit` does."""
    one_or_more = key == "model.patch_size"  # one number, or one per stage
    if isinstance(value, (list, tuple)) and (one_or_more or isinstance(default, tuple)):
        entry = default if one_or_more else ENTRIES.get(key, default[0] if default else None)
        fitted = tuple(_plain(key, x, entry) for x in value)
    else:
        fitted = None if isinstance(default, tuple) else _plain(key, value, default)
    if fitted is None or isinstance(fitted, tuple) and None in fitted:
        raise UserError(
            f"{where}{key}={_short(value)}: expected a value like {default!r} ({type(default).__name__})"
        )
    return check(where + key, fitted, BOUNDS.get(key), CHOICES.get(key), key in PATHS)


def check(
    name: str,
    value: Any,
    interval: str | None = None,
    choices: Sequence[str] | None = None,
    is_path=True,
) -> Any:
    """Return a plain value, or a tuple of them, of the key or flag `name`; "~" in a path is expanded.

    Raises UserError for a number outside `interval` (such as "(0, 1]"), a value that is not one of
    `choices`, and a text that cannot be text or a path.
    """
    if choices and value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if isinstance(value, tuple):
        return tuple(check(name, one, interval, None, is_path) for one in value)
    if interval and not isinstance(value, (bool, str)):
        _check_bounds(name, value, interval)
    return files.clean_text(name, value, is_path) if isinstance(value, str) else value


def _plain(key: str, value: Any, default: Any) -> Any:
    """Return a value as the plain Python type of the default; None if its type differs."""
    kind = type(default)
    if isinstance(value, (bool, np.bool_)) or kind is bool:
        return bool(value) if isinstance(value, (bool, np.bool_)) and kind is bool else None
    if kind is float and isinstance(value, (int, float, np.integer, np.floating)):
        return float(value) if isinstance(value, np.floating) or abs(value) < 1e300 else float("inf")
    if kind is int and isinstance(value, (int, np.integer)):
        return int(value)
    return str(value) if kind is str and isinstance(value, str) else None


def _check_bounds(name: str, value: float, interval: str) -> None:
    if value != value or abs(value) == float("inf"):
        raise UserError(f"{name}={value} is not a finite number")
    low, high = map(_number, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not above and interval[0] == "[":
        most = f" and at most {high:.10g}" if high < float("inf") else ""
        raise UserError(f"{name} must be at least {low:.10g}{most}, got {value}")
    if not (above and below and abs(value) <= MOST):
        interval = interval.replace("inf)", f"{MOST}]")
        raise UserError(f"{name} must lie in {interval}, got {value}")


def _number(text: str) -> float:
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def parse(key: str, text: str, default: Mapping[str, Any]) -> Any:
    """Return the value of --config.KEY=TEXT. Raises UserError as `fit` does."""
    where = "--config."
    like = _at(dict(_leaves(default, default, where)), key, where)
    value: Any = text
    if not isinstance(like, str):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(like, tuple) and not isinstance(value, (list, tuple)):
        value = (value,)
    if type(like) is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6 is a natural way to write a number of steps
    return fit_value(key, value, like, where)


def as_dict(config: Any, what: str) -> dict[str, Any]:
    """Return the values of a ConfigDict with references resolved. Raises UserError for other types."""
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"{what} must be default_config() with changes, a ConfigDict, not {kind}")
    with blame(f"{what} has a reference without a value"):
        return config.to_dict()


def _short(value: Any) -> str:
    return sentence(ValueError(repr(value)), 200)
