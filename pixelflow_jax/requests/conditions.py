"""What the images of a request show: labels or prompts, ready for the network."""

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

from pixelflow_jax.common import UserError, arrays
from pixelflow_jax.config import DTYPES
from pixelflow_jax.data.names import loose
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import Condition
from pixelflow_jax.requests.layouts import check_layout, read_prompts_file
from pixelflow_jax.requests.request import Request, as_flag
from pixelflow_jax.sampling import starts
from pixelflow_jax.text.encoder import JOINT, TextEncoder, make_tokenizer, trusted_encoder, warn_of_cuts
from pixelflow_jax.text.tokenizer import Tokens

LABEL_FLAGS, PROMPT_FLAGS = (
    ("labels", "negative_labels"),
    ("prompt", "prompts_file", "negative_prompt", "layout", "text_encoder"),
)
ENCODED, KEPT = 16, 64  # texts per batch of a frozen encoder, and batches of states in memory


class States:
    """A frozen encoder's states of many texts, computed when an image needs them.

    Texts are encoded ENCODED at a time, always the same ones together, so that a text's states do not
    depend on which images need it. If memory holds them all, they are encoded right away, and the
    encoder is let go.
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
        """Return the states of these texts."""
        found = [(self.of_batch(row // ENCODED), row % ENCODED) for row in rows.tolist()]
        return {name: np.stack([part[name][place] for part, place in found]) for name in found[0][0]}


@dataclasses.dataclass(frozen=True)
class Conditions:
    """The conditions of all images of a request.

    Attributes:
      table, null_table: what the two halves of the network see; several images may share a row.
      rows, null_rows: the row of each image in the two tables.
      extra: for samples.npz: "labels", or "prompt", the prompt's index.
      described: for settings.json.
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
        """Return (condition, null condition) of these images."""
        pairs = (self.table, self.rows[index]), (self.null_table, self.null_rows[index])
        return tuple(
            x.take(rows) if isinstance(x, States) else {name: part[rows] for name, part in x.items()}
            for x, rows in pairs
        )

    def described_of(self, index: int) -> dict[str, Any]:
        """Return `described` for one image."""
        one = dict(self.described)
        if "prompts" in one:
            one["prompts"] = [one["prompts"][self.rows[index]]]
        else:
            one["labels"] = [int(self.table["labels"][index])]
            if one["negative_labels"]:
                one["negative_labels"] = [int(self.null_table["labels"][index])]
        return one


def class_numbers(flag: str, asked: Sequence[int | str], names: dict[int, str], count: int) -> list[int]:
    """Return the numbers of classes given by number or name; `names` are the known ones of `count`.

    Raises UserError, with the flag, for an unknown number or name, or one that several classes share.
    """
    return [_class_number(flag, label, names, count) for label in asked]


def _class_number(flag: str, label: int | str, names: dict[int, str], count: int) -> int:
    if isinstance(label, str):
        found = [x for x, name in names.items() if name == label]
        found = found or [x for x, name in names.items() if loose(name) == loose(label)]
        # ImageNet's names list synonyms: tench, Tinca tinca
        found = found or [x for x, name in names.items() if loose(label) in map(loose, name.split(", "))]
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
            f"note: --{flag}={label} is the class {names[label]!r} by its number; the class of that "
            f"name is --{flag}='{as_flag([str(label)])}'",
            file=sys.stderr,
        )
    return label


def trained_classes(meta: dict[str, Any], count: int) -> dict[int, str]:
    """Return the numbers and names of the trained classes, if the checkpoint stores them."""
    kept = meta.get("classes")  # a checkpoint is not trusted
    known = kept.items() if isinstance(kept, dict) else ()
    numbers = {int(label): str(name) for label, name in known if re.fullmatch(r"[0-9]{1,9}", label)}
    return {label: name for label, name in sorted(numbers.items()) if label < count}


def read_conditions(
    request: Request, config: ConfigDict, start: Any, meta: dict[str, Any], count: int | None = None
) -> Conditions:
    """Return the conditions of the images of a request. Raises UserError if it does not fit the model.

    Args:
      request: the request.
      config, meta: from the checkpoint.
      start: where the images start (see starts.py), if set.
      count: the number of images, if neither request nor start determines it.
    """
    text = config.model.context_dim > 0
    for name in LABEL_FLAGS if text else PROMPT_FLAGS:
        if getattr(request, name) is not None:
            kind, other = ("text", "--prompt") if text else ("class", "--labels")
            raise UserError(
                f"--checkpoint={request.checkpoint} is a {kind} model: use {other}, not --{name}"
            )
    if isinstance(start, starts.BetweenSeeds):
        count = start.count
    elif isinstance(start, starts.FromNoise):
        count = len(start.kept.start)
    count = request.num_images or count
    if text:
        return _of_prompts(request, config, count)
    return _of_labels(request, config, start, trained_classes(meta, config.model.num_classes), count)


def _of_labels(
    request: Request, config: ConfigDict, start: Any, names: dict[int, str], count: int | None
) -> Conditions:
    classes = max(config.model.num_classes, 1)  # without classes, all are 0, which the network ignores
    described: dict[str, Any] = {flag: getattr(request, flag) for flag in LABEL_FLAGS}
    for flag, asked in described.items():
        described[flag] = asked and class_numbers(flag, asked, names, classes)
    if request.labels:
        pattern = np.array(described["labels"])
    elif isinstance(start, starts.FromNoise):
        pattern = read_labels(request.from_noise, classes)
    else:
        pattern = np.array(sorted(names) or range(classes))
        pattern = pattern[:1] if isinstance(start, starts.BetweenSeeds) else pattern
    count = count or (len(request.labels) if request.labels else config.sample.num_images)
    number = (request.first_image or 0) + np.arange(count)
    labels = pattern.astype(np.int32)[number % len(pattern)]
    negative = np.array(described["negative_labels"] or [config.model.num_classes], np.int32)
    null = negative[number % len(negative)]
    each = np.arange(count)
    return Conditions({"labels": labels}, {"labels": null}, each, each, {"labels": labels}, described)


def read_labels(path: str, classes: int) -> Int[np.ndarray, " n"]:
    """Read the labels in a noise.npz. Raises UserError if they are not classes of the model."""
    labels = arrays.read_npz(path, "labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"--from_noise={path}: its labels are not a list of whole numbers")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"--from_noise={path}: its labels are not classes of this model; give --labels")
    return labels


def _of_prompts(request: Request, config: ConfigDict, count: int | None) -> Conditions:
    entries = read_prompts(request)
    prompts = [entry["prompt"] for entry in entries]
    negative, count = request.negative_prompt or "", count or len(prompts)
    if request.layout is not None:
        check_layout(request.layout, entries, count)
    rows = (((request.first_image or 0) + np.arange(count)) % len(prompts)).astype(np.int32)
    table, null_rows = encode(request, [*prompts, negative], config), np.full_like(rows, len(prompts))
    described = {"prompts": prompts, "negative_prompt": negative, "text_encoder": config.text.encoder}
    return Conditions(table, table, rows, null_rows, {"prompt": rows}, described)


def encode(request: Request, texts: list[str], config: ConfigDict) -> Condition | States:
    """Return token ids for a joint encoder, or the states of a frozen encoder; warn about cut texts.

    Raises UserError if the encoder is missing or does not fit the model.
    """
    if request.text_encoder is not None:
        if config.text.encoder == JOINT:
            raise UserError("--text_encoder is for frozen encoders; this model contains its own")
        config.text.encoder = request.text_encoder
    else:
        config.text.encoder = trusted_encoder(config.text.encoder, request.checkpoint)
    length = config.text.max_length
    tokens = make_tokenizer(config)(texts, length)
    warn_of_cuts(texts, tokens.cut, length)
    if config.text.encoder == JOINT:
        return tokens.condition()
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    encoder = _encoder(
        config.text.encoder, mesh, request.dtype or config.dtype, config.model.context_dim
    )
    return States(encoder, tokens)


@functools.lru_cache(maxsize=1)  # gigabytes, reused by the next request of a notebook or the demo
def _encoder(name: str, mesh: Mesh, dtype: str, width: int) -> TextEncoder:
    return TextEncoder(name, mesh, DTYPES[dtype], width)


def forget_encoder() -> None:
    """Free the device memory of a frozen encoder."""
    _encoder.cache_clear()


def read_prompts(request: Request) -> list[dict]:
    """Return [{"prompt": ...}] of all prompts. Raises UserError if there are none, or one is empty."""
    entries = [{"prompt": prompt.strip()} for prompt in request.prompt or ()]
    for number, entry in enumerate(entries, 1):
        if not entry["prompt"]:
            raise UserError(f"--prompt number {number} is empty; say what the image should show")
    if request.prompts_file is not None:
        entries += read_prompts_file(request.prompts_file)
    if not entries:
        raise UserError(f'--checkpoint={request.checkpoint} is a text model: give it a --prompt="..."')
    return entries
