"""Captioned images: folders (Hugging Face's ImageFolder convention) and WebDataset tar shards.

A captioned Source (see sources.py) gives (encoded image, captions): of several, each step draws one.
"""

import collections
import json
import os
import tarfile
from typing import Any

import numpy as np
from etils import epath

from pixelflow_jax import files
from pixelflow_jax.data.pixels import (
    SUFFIXES,
    is_image,
    is_left_behind,
    kinds_left_out,
    report_left_out,
)
from pixelflow_jax.errors import UserError

SPLITS = ("train", "val", "valid", "validation", "test")
METADATA = "metadata.jsonl"
KEYS = ("text", "caption", "captions", "prompt")  # of a line of metadata.jsonl or of a .json in a tar
LISTED = 5  # of the images without a caption, in the error


def split_root(path: str, split: str) -> str:
    """The folder of a split: path/split; for "train" the path itself, if no split has a folder there."""
    root = epath.Path(path)
    if not root.is_dir():
        raise UserError(f"config.data.path={path} is not a folder")
    if (root / split).is_dir():
        return str(root / split)
    there = [name for name in SPLITS if (root / name).is_dir()]
    if there or split != "train":
        raise UserError(
            f"config.data.split={split!r}: there is no {path}/{split}; splits there: "
            f"{', '.join(there) or 'none'}"
        )
    return str(root)


def captions_of(values: dict[str, Any], where: str) -> tuple[str, ...]:
    """The captions in a JSON object, under one of KEYS. Raises UserError if there are none."""
    for key in KEYS:
        if key in values:
            found = values[key] if isinstance(values[key], list) else [values[key]]
            if not found or not all(isinstance(text, str) for text in found):
                raise UserError(f"{where}: {key!r} must be a text or a list of texts")
            return tuple(found)
    raise UserError(f"{where} has no caption; it needs one of the keys {', '.join(KEYS)}")


def decode_captions(data: bytes, where: str) -> tuple[str, ...]:
    """The captions in a .txt, one a line. Raises OSError, as for a broken image, if it is not UTF-8."""
    try:
        lines = [line.strip() for line in data.decode().splitlines()]
    except UnicodeDecodeError as error:
        raise OSError(f"the caption {where} is not UTF-8: {error}") from None
    captions = tuple(line for line in lines if line)
    if not captions:
        raise OSError(f"the caption {where} is empty")
    return captions


class CaptionFolder:
    """Images anywhere below a folder, with their captions.

    Either metadata.jsonl beside the images, a line each: {"file_name": "a.png", "text": "..."}; or for
    each image NAME.txt, with a caption a line.

    Raises:
      UserError: if an image has no caption, or metadata.jsonl is not what it should be.
    """

    captioned, num_classes = True, 0

    def __init__(self, path: str, split: str):
        self.root = split_root(path, split)
        self._names, self._captions = [], {}
        bare, others = [], collections.Counter()
        for folder, names in files.walk(self.root):
            found = [name for name in names if is_image(folder + name)]
            others.update(kinds_left_out(folder + name for name in names if not _is_caption(name)))
            if METADATA in names:
                self._captions |= read_metadata(self.root, folder)
            texts = {name.removesuffix(".txt") for name in names if name.endswith(".txt")}
            for name in found:
                full = f"{folder}{name}"
                self._names.append(full)
                if full not in self._captions and os.path.splitext(name)[0] not in texts:
                    bare.append(full)
        report_left_out(self.root, others)
        if missing := self._captions.keys() - set(self._names):
            raise UserError(f"{self.root}: {METADATA} names {min(missing)}, which is not there")
        bare = [name for name in bare if name not in self._captions]
        if bare:
            raise UserError(
                f"{self.root}: {len(bare)} of {len(self._names)} images have no caption (a line in "
                f"{METADATA}, or NAME.txt): {', '.join(bare[:LISTED])}"
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[bytes, tuple[str, ...]]:
        with files.reading():
            return files.read_bytes(self.name(index)), self.captions(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """Those of example `index`, without its image."""
        name = self._names[index]
        if name in self._captions:
            return self._captions[name]
        text = f"{self.root}/{os.path.splitext(name)[0]}.txt"
        return decode_captions(files.read_bytes(text), text)

    def name(self, index: int) -> str:
        return f"{self.root}/{self._names[index]}"


def _is_caption(name: str) -> bool:
    return name == METADATA or name.endswith(".txt")


def read_metadata(root: str, folder: str) -> dict[str, tuple[str, ...]]:
    """Captions by file name (relative to root), of root/folder/metadata.jsonl."""
    path = f"{root}/{folder}{METADATA}"
    found = {}
    for number, line in enumerate(files.read_bytes(path).splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            name = values["file_name"]
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8: {error}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{where} is not a JSON object with a file_name: {error}") from None
        found[f"{folder}{name}"] = captions_of(values, where)
    return found


class TarSource:
    """WebDataset shards: the members KEY.jpg (or another image) and KEY.txt or KEY.json of *.tar files.

    Each shard's table of contents is read once; examples are then read by their place in the file.

    Raises:
      UserError: if there are no shards, one cannot be read, or an image has no caption.
    """

    captioned, num_classes = True, 0

    def __init__(self, path: str, split: str):
        self.root = split_root(path, split)
        names = [name for name in files.list_files(self.root) if name.endswith(".tar")]
        if not names:
            raise UserError(f"{self.root} holds no .tar files")
        self._keys, places = [], []
        for shard, name in enumerate(names):
            for key, image, text in _contents(f"{self.root}/{name}"):
                self._keys.append(f"{name}:{key}")
                places.append((shard, *image, *text))
        self._paths = [f"{self.root}/{name}" for name in names]
        self._places = np.array(places, np.int64).reshape(-1, 6)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> tuple[bytes, tuple[str, ...]]:
        shard, begin, size, text_begin, text_size, is_json = self._places[index].tolist()
        with files.reading(), epath.Path(self._paths[shard]).open("rb") as file:
            file.seek(begin)
            image = file.read(size)
            file.seek(text_begin)
            text = file.read(text_size)
            if is_json:
                return image, captions_of(json.loads(text), self.name(index))
            return image, decode_captions(text, self.name(index))

    def name(self, index: int) -> str:
        return f"{self.root}/{self._keys[index]}"


def _contents(path: str) -> list[tuple[str, tuple[int, int], tuple[int, int, bool]]]:
    """(key, (place, size) of its image, (place, size, whether JSON) of its caption), in order."""
    images, texts = {}, {}
    try:
        with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile() or is_left_behind(member.name):
                    continue
                folder, name = os.path.split(member.name)
                key, _, extension = name.partition(".")
                key, extension = os.path.join(folder, key), f".{extension.lower()}"
                place = member.offset_data, member.size
                if extension in SUFFIXES:
                    images[key] = place
                elif extension == ".txt" or (extension == ".json" and key not in texts):
                    texts[key] = (*place, extension == ".json")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is not a tar file that can be read: {error}") from None
    bare = [key for key in images if key not in texts]
    if bare:
        raise UserError(
            f"{path}: {len(bare)} of {len(images)} images have no caption (.txt or .json): "
            f"{', '.join(bare[:LISTED])}"
        )
    return [(key, place, texts[key]) for key, place in images.items()]
