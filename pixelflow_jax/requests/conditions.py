"""What the images of a `sample` request are to show: labels or prompts, ready for the network."""

import argparse
import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from pixelflow_jax.common import arrays
from pixelflow_jax.common.errors import UserError
from pixelflow_jax.config import DTYPES
from pixelflow_jax.data.names import loose
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import Condition
from pixelflow_jax.requests.layouts import check_layout, read_prompts_file
from pixelflow_jax.sampling import starts
from pixelflow_jax.text.encoder import (
    JOINT,
    TextEncoder,
    make_tokenizer,
    trusted_encoder,
    warn_of_cuts,
)
from pixelflow_jax.text.tokenizer import Tokens

LABEL_FLAGS, PROMPT_FLAGS = (
    ("labels", "negative_labels"),
    ("prompt", "prompts_file", "negative_prompt", "layout", "text_encoder"),
)
CLASS = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^",]*?))\s*(,|$)')  # of a list of classes
ENCODED, KEPT = 16, 64  # texts a batch of a frozen encoder, and batches whose states are kept


class States:
    """A frozen encoder's states of many texts, made when an image needs them.

    A text's states do not depend on who asks: texts are encoded ENCODED at a time, always the same ones
    together. As many as are kept are encoded at once, after which nothing here holds the encoder.
    """

    def __init__(self, encoder: TextEncoder, tokens: Tokens):
        self._encoder, self._tokens = encoder, tokens
        self.of_batch = functools.lru_cache(KEPT)(self._encode)
        batches = -(-len(tokens.ids) // ENCODED)
        if batches <= KEPT:
            for batch in range(batches):
                self.of_batch(batch)
            self._encoder = None

    def _encode(self, batch: int) -> Condition:
        index = np.arange(batch * ENCODED, (batch + 1) * ENCODED) % len(self._tokens.ids)
        found = self._encoder.condition(self._tokens.ids[index], self._tokens.mask[index])
        return jax.tree.map(np.asarray, found)

    def take(self, rows: Int[np.ndarray, " b"]) -> Condition:
        """Those of these texts."""
        found = [(self.of_batch(row // ENCODED), row % ENCODED) for row in rows.tolist()]
        return {name: np.stack([part[name][place] for part, place in found]) for name in found[0][0]}


@dataclasses.dataclass(frozen=True)
class Conditions:
    """The conditions of all images.

    Attributes:
      table, null_table: what the two halves of the network see; several images may share a row.
      rows: of each image, in the first table and in the second.
      extra: what samples.npz holds of it: "labels", or "prompt", the prompt's number.
      described: what settings.json says of it.
    """

    table: Condition | States
    null_table: Condition | States
    rows: Int[np.ndarray, " n"]
    null_rows: Int[np.ndarray, " n"]
    extra: dict[str, np.ndarray]
    described: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, index: Int[np.ndarray, " b"]) -> tuple[Condition, Condition]:
        """(condition, null condition) of these images."""
        pairs = (self.table, self.rows[index]), (self.null_table, self.null_rows[index])
        return tuple(
            x.take(rows) if isinstance(x, States) else {name: part[rows] for name, part in x.items()}
            for x, rows in pairs
        )

    def described_of(self, index: int) -> dict[str, Any]:
        """`described`, for one image."""
        one = dict(self.described)
        if "prompts" in one:
            one["prompts"] = [one["prompts"][self.rows[index]]]
        else:
            one["labels"] = [int(self.table["labels"][index])]
            if one["negative_labels"]:
                one["negative_labels"] = [int(self.null_table["labels"][index])]
        return one


def labels(text: str) -> tuple[int | str, ...]:
    """Numbers or names of classes separated by commas, for argparse; quotes make a name of anything."""
    found, place, more = [], 0, ","
    while more and (match := CLASS.match(text, place)):
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
    raise argparse.ArgumentTypeError(
        f"expected numbers or names of classes separated by commas (a name with a comma in quotes), got "
        f"{text!r}"
    )


def as_flag(asked: Sequence[int | str]) -> str:
    """Numbers and names of classes as `labels` reads them: what is a string here stays a name."""
    return ",".join('"{}"'.format(x.replace('"', '""')) if isinstance(x, str) else str(x) for x in asked)


def class_numbers(flag: str, asked: Sequence[int | str], names: dict[int, str], count: int) -> list[int]:
    """The numbers of classes that are asked for by number or name.

    Args:
      names: of the classes, as far as they are known.
      count: how many classes the model has.

    Raises:
      UserError: for a number or a name that no class has, or a name that several have.
    """
    return [_class_number(flag, label, names, count) for label in asked]


def _class_number(flag: str, label: int | str, names: dict[int, str], count: int) -> int:
    if isinstance(label, str):
        found = [x for x, name in names.items() if name == label]
        found = found or [x for x, name in names.items() if loose(name) == loose(label)]
        if len(found) > 1:
            raise UserError(f"--{flag}: the classes {found} are all called {label!r}: give a number")
        if found:
            return found[0]
        if not label.isdecimal():
            close = difflib.get_close_matches(label, names.values(), n=3, cutoff=0.5)
            near = f"near are {as_flag(close)}; " if close else ""
            near = near if names else "the checkpoint keeps no names of classes; "
            raise UserError(
                f"--{flag}: no class is called {label!r}; {near}give whole numbers, 0 to {count - 1}"
            )
        label = int(label)
    if not 0 <= label < count:
        raise UserError(f"--{flag}: {label} is not a class; they are 0 to {count - 1}")
    if names.get(label, str(label)) != str(label) and str(label) in names.values():
        print(
            f"note: --{flag}={label} is the class {names[label]!r} by its number; the one of this name "
            f"is --{flag}='{as_flag([str(label)])}'",
            file=sys.stderr,
        )
    return label


def trained_classes(meta: dict[str, Any], count: int) -> dict[int, str]:
    """Numbers and names of the classes that training saw, below `count`, as far as a checkpoint says."""
    kept = meta.get("classes")  # a checkpoint may come from anywhere
    known = kept.items() if isinstance(kept, dict) else ()
    numbers = {int(label): str(name) for label, name in known if re.fullmatch(r"[0-9]{1,9}", label)}
    return {label: name for label, name in sorted(numbers.items()) if label < count}


def read_conditions(
    args: argparse.Namespace, config: ConfigDict, start: Any, meta: dict[str, Any]
) -> Conditions:
    """What the flags ask of a checkpoint. Raises UserError if that does not fit the model."""
    text = config.model.context_dim > 0
    for name in LABEL_FLAGS if text else PROMPT_FLAGS:
        if getattr(args, name) is not None:
            kind, other = ("text", "--prompt") if text else ("class", "--labels")
            raise UserError(
                f"--checkpoint={args.checkpoint} is a {kind} model: use {other}, not --{name}"
            )
    if text:
        return _of_prompts(args, config, start)
    return _of_labels(args, config, start, trained_classes(meta, config.model.num_classes))


def _count(args: argparse.Namespace, start: Any, default: int) -> int:
    if isinstance(start, starts.BetweenSeeds):
        return start.count
    if isinstance(start, starts.FromNoise):
        default = len(start.kept.start)
    return args.num_images or default


def _of_labels(args, config: ConfigDict, start: Any, names: dict[int, str]) -> Conditions:
    classes = max(config.model.num_classes, 1)  # without classes, all are 0, which the network ignores
    for flag in LABEL_FLAGS:
        if getattr(args, flag):
            setattr(args, flag, class_numbers(flag, getattr(args, flag), names, classes))
    if args.labels:
        pattern = np.array(args.labels)
    elif isinstance(start, starts.FromNoise):
        pattern = read_labels(args.from_noise, classes)
    else:
        pattern = np.array(sorted(names) or range(classes))
        pattern = pattern[:1] if isinstance(start, starts.BetweenSeeds) else pattern
    count = _count(args, start, len(args.labels) if args.labels else config.sample.num_images)
    number = args.first_image + np.arange(count)
    labels = pattern.astype(np.int32)[number % len(pattern)]
    negative = np.array(args.negative_labels or [config.model.num_classes], np.int32)
    null = negative[number % len(negative)]
    described = {"labels": args.labels, "negative_labels": args.negative_labels}
    each = np.arange(count)
    return Conditions({"labels": labels}, {"labels": null}, each, each, {"labels": labels}, described)


def read_labels(path: str, classes: int) -> Int[np.ndarray, " n"]:
    """The labels in a noise.npz. Raises UserError if they are not classes of the model."""
    labels = arrays.read_npz(path, "labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"--from_noise={path}: its labels are not a list of whole numbers")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"--from_noise={path}: its labels are not classes of this model; give --labels")
    return labels


def _of_prompts(args, config: ConfigDict, start: Any) -> Conditions:
    entries = read_prompts(args)
    prompts = [entry["prompt"] for entry in entries]
    negative = args.negative_prompt or ""
    count = _count(args, start, len(prompts))
    if args.layout is not None:
        check_layout(args.layout, entries, count)
    rows = ((args.first_image + np.arange(count)) % len(prompts)).astype(np.int32)
    table, null_rows = encode(args, [*prompts, negative], config), np.full_like(rows, len(prompts))
    described = {"prompts": prompts, "negative_prompt": negative, "text_encoder": config.text.encoder}
    return Conditions(table, table, rows, null_rows, {"prompt": rows}, described)


def encode(args, texts: list[str], config: ConfigDict) -> Condition | States:
    """Token ids for an encoder in the model, or a frozen encoder's states; warns of texts cut off.

    Raises:
      UserError: if the encoder is missing or does not fit the model.
    """
    if args.text_encoder is not None:
        if config.text.encoder == JOINT:
            raise UserError("--text_encoder is for models without one; this one has its own")
        config.text.encoder = args.text_encoder
    else:
        config.text.encoder = trusted_encoder(config.text.encoder, args.checkpoint)
    length = config.text.max_length
    tokens = make_tokenizer(config)(texts, length)
    warn_of_cuts(texts, tokens.cut, length)
    if config.text.encoder == JOINT:
        return tokens.condition()
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    encoder = _encoder(config.text.encoder, mesh, args.dtype or config.dtype, config.model.context_dim)
    return States(encoder, tokens)


@functools.lru_cache(maxsize=1)  # gigabytes: the next request of a notebook or the demo has them
def _encoder(name: str, mesh: Mesh, dtype: str, width: int) -> TextEncoder:
    return TextEncoder(name, mesh, DTYPES[dtype], width)


def forget_encoder() -> None:
    """Frees what a frozen encoder takes of the devices."""
    _encoder.cache_clear()


def read_prompts(args: argparse.Namespace) -> list[dict]:
    """[{"prompt": ...}] of --prompt and --prompts_file. Raises UserError for none, or an empty one."""
    entries = [{"prompt": prompt.strip()} for prompt in args.prompt or ()]
    for number, entry in enumerate(entries, 1):
        if not entry["prompt"]:
            raise UserError(f"--prompt number {number} is empty; say what the image shall show")
    if args.prompts_file is not None:
        entries += read_prompts_file(args.prompts_file)
    if not entries:
        raise UserError(f'--checkpoint={args.checkpoint} is a text model: give it a --prompt="..."')
    return entries
