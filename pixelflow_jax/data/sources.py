"""Where images come from. A source is `len`, `source[i]` and `source.name(i)`, in a fixed order.

`source[i]` is (data, label): data is an encoded image as bytes, or uint8 [H, W, 3]. The label is a class
or, of captioned sources, a tuple of captions.
"""

import collections
import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from pixelflow_jax.common import files
from pixelflow_jax.common.errors import UserError, blame, optional
from pixelflow_jax.data import idx, records
from pixelflow_jax.data.captioned_digits import captioned_digits
from pixelflow_jax.data.captions import CaptionFolder, TarSource
from pixelflow_jax.data.names import SPLITS, Strings, split_root
from pixelflow_jax.data.pixels import is_image, is_left_behind, kinds_left_out, report_left_out
from pixelflow_jax.data.texts import some

log = logging.getLogger(__name__)
HELD_OUT = tuple(name for name in SPLITS if name != "train")
HOLD_OUT_EVERY = 4  # of the digits, every 4th image is kept for evaluation


class Source(Protocol):
    """Random access to images and their labels.

    Where it is known there are also `classes`, the names of all classes; `present`, the numbers of those
    that have examples; `digest()`, a text that is another one for other examples, wherever they lie;
    `head(index, size)`, the first bytes of an image; `captions(index)`, without the image; `captioned`.
    """

    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int | tuple[str, ...]]: ...

    def name(self, index: int) -> str:
        """What to call example `index` in a message: its file, or its place."""


def open_source(
    data: ConfigDict,
    split: str | None = None,
    workdir: epath.Path | None = None,
    watch: Callable[[str], None] = lambda what: None,
) -> Source:
    """The source that `config.data` names; split defaults to `data.split`.

    `workdir` may keep an index of what was read, and `watch` is told how far that is.

    Raises:
      UserError: for an unknown source or missing files.
    """
    if data.source not in SOURCES:
        raise UserError(f"config.data.source must be one of {', '.join(SOURCES)}, got {data.source!r}")
    if data.source not in BUNDLED and not data.path and not (data.source == "tfds" and data.name):
        raise UserError(f"config.data.source={data.source} needs --config.data.path")
    local = data.source not in BUNDLED and "://" not in data.path
    if local and data.path and not epath.Path(data.path).exists():
        raise UserError(f"config.data.path={data.path} is not there: not a folder, nor a file")
    index = (workdir, watch) if data.source == "webdataset" else ()
    source = SOURCES[data.source](data, split or data.split, *index)
    if not len(source):
        raise UserError(f"config.data.path={data.path} holds no images")
    return source


def load_source(
    config: ConfigDict,
    split: str | None = None,
    workdir: epath.Path | None = None,
    watch: Callable[[str], None] = lambda what: None,
) -> Source:
    """`open_source`, if it fits the model; logs if that has more classes.

    Raises:
      UserError: also for captions where the model takes classes, the other way round, and for labels
        that the model has no class for.
    """
    data, source = config.data, open_source(config.data, split, workdir, watch)
    captioned = getattr(source, "captioned", False)
    if captioned != bool(config.model.context_dim):
        raise UserError(
            f"config.data.source={data.source} has {'captions' if captioned else 'classes'}, but the "
            f"model takes {'classes' if captioned else 'text'} (config.model.context_dim)"
        )
    classes = config.model.num_classes
    if classes and not captioned and not source.num_classes:
        raise UserError(
            f"config.data.path={data.path} has images, but no class folders; config.model.num_classes "
            f"is {classes}: sort them into folders, or set that to 0"
        )
    if classes and source.num_classes > classes:
        raise UserError(
            f"config.data.source={data.source} has {source.num_classes} classes, but "
            f"config.model.num_classes is {classes}"
        )
    if classes and (found := len(class_names(source))) < classes:
        log.warning(
            "the data have examples of %d classes, config.model.num_classes is %d: %d are never trained",
            *(found, classes, classes - found),
        )
    return source


def class_names(source: Source) -> dict[int, str]:
    """Number and name of every class that has examples, as far as the source knows that."""
    names = getattr(source, "classes", ())
    there = getattr(source, "present", None)
    there = range(source.num_classes) if there is None else there
    return {int(label): names[label] if label < len(names) else str(label) for label in there}


def captions_at(source: Source, index: int) -> tuple[str, ...]:
    """The captions of an example, without its image where the source can do that.

    Raises:
      OSError: if they cannot be read, or all are blank.
    """
    captions = getattr(source, "captions", None)
    return some(captions(index) if captions else source[index][1])


def readable_captions(source: Source, index: int) -> tuple[str, ...]:
    """Those of an example (of a number that may pass the end), or of the next whose can be read."""
    for step in range(len(source)):
        with contextlib.suppress(OSError):
            return captions_at(source, (index + step) % len(source))
    raise UserError("no caption of the data can be read")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory, all of one size."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]
    checksum: str = ""  # of the files that they are from

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def present(self) -> list[int]:
        return np.unique(self.labels).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"image {index}"

    def digest(self) -> str:
        """Of the files' pixels and labels; nothing for what comes with a package."""
        return self.checksum


def digits(data: ConfigDict, split: str) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits (8x8 scans), bicubic to `resolution`, grey as RGB."""
    from sklearn.datasets import load_digits  # takes a second to import

    if split not in ("train", "test"):
        raise UserError(f"config.data.split must be train or test for digits, got {split!r}")
    bundle = load_digits()
    held_out = np.arange(len(bundle.target)) % HOLD_OUT_EVERY == 0
    chosen = held_out if split == "test" else ~held_out
    size = (data.resolution, data.resolution)
    scans = np.round(bundle.images[chosen] * (255 / 16)).astype(np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.BICUBIC)) for x in scans])
    images = np.repeat(grey[..., None], 3, axis=-1)
    return ArraySource(images, bundle.target[chosen].astype(np.int32))


def idx_files(data: ConfigDict, split: str) -> ArraySource:
    """A folder of MNIST-format files, grey as RGB, padded with black to `resolution`."""
    grey, labels = idx.read_split(data.path, split)
    checksum = hashlib.sha256(grey.tobytes() + labels.tobytes()).hexdigest()
    height, width = grey.shape[1:]
    if data.crop == "none":
        if max(height, width) > data.resolution:
            raise UserError(
                f"{data.path} has images of {height}x{width}, more than config.data.resolution="
                f"{data.resolution}; set --config.data.crop=center"
            )
        before = [(data.resolution - size) // 2 for size in (height, width)]
        after = [data.resolution - size - b for size, b in zip((height, width), before, strict=True)]
        grey = np.pad(grey, [(0, 0), *zip(before, after, strict=True)])
    return ArraySource(np.repeat(grey[..., None], 3, axis=-1), labels.astype(np.int32), checksum)


class FolderSource:
    """A folder of class folders, as torchvision's ImageFolder lays them out, or of images alone.

    Classes are the sorted names of the folders below the root (or below root/split if that exists);
    a class's images are all image files below its folder, sorted. Local or gs:// paths.
    """

    def __init__(self, path: str, split: str):
        self.root = split_root(path, split)
        folders = _folders(self.root)
        beside = folders.pop("", [])
        flat, others = [x for x in beside if is_image(x)], collections.Counter(kinds_left_out(beside))
        self.classes, names, labels = sorted(folders), [], []
        for label, name in enumerate(self.classes):
            found = [x for x in folders[name] if is_image(x)]
            others.update(kinds_left_out(folders[name]))
            if not found:
                log.warning("class folder %s/%s holds no images", self.root, name)
            names += found
            labels += [label] * len(found)
        if names and flat:
            log.warning("%s: %d images are in no class folder and not taken", self.root, len(flat))
        elif flat:
            names, labels, self.classes = flat, [0] * len(flat), []
        elif not self.classes:
            raise UserError(f"{self.root} holds no class folders, and no images")
        report_left_out(self.root, others)
        self._names, self._labels = Strings(names), np.array(labels, np.int32)
        self.num_classes, self.present = len(self.classes), np.unique(self._labels).tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with files.reading():
            return files.read_bytes(self.name(index)), int(self._labels[index])

    def head(self, index: int, size: int) -> bytes:
        """The first bytes of an image."""
        return files.read_bytes(self.name(index), 0, size)

    def name(self, index: int) -> str:
        return f"{self.root}/{self._names[index]}"

    def digest(self) -> str:
        """Of the images' names and their classes."""
        return hashlib.sha256(self._names.digest().encode() + self._labels.tobytes()).hexdigest()


def _folders(root: str) -> dict[str, list[str]]:
    """The files below each folder in the root, relative to it, and in the root itself (""), sorted.

    A bucket is listed once, and has no empty folders.
    """
    found: dict[str, list[str]] = {"": []}
    if "://" in root:
        for where, names in files.walk(root):
            folder = where.partition("/")[0]
            found.setdefault(folder, []).extend(f"{where}{name}" for name in names)
    else:
        for entry in epath.Path(root).iterdir():
            if entry.is_dir():
                walked = () if is_left_behind(entry.name) else files.walk(root, entry.name)
                found[entry.name] = [f"{where}{name}" for where, names in walked for name in names]
            else:
                found[""].append(entry.name)
    found[""].sort()
    return {folder: names for folder, names in found.items() if not is_left_behind(folder)}


def held_out(config: ConfigDict) -> tuple[Source, str]:
    """(images that training does not see, the name of their split): the first that is there.

    Raises:
      UserError: if there is none.
    """
    problem = None
    for split in HELD_OUT:
        try:
            return load_source(config, split), split
        except UserError as error:
            problem = problem or error
    raise problem


class TfdsSource:
    """A TFDS dataset prepared as ArrayRecord, by random access and without TensorFlow.

    Images stay encoded. `name` is a dataset name ("imagenet2012"), looked up in `path` (default:
    TFDS's own folder); without a name, `path` is a prepared dataset's version folder.
    """

    def __init__(self, path: str, name: str, split: str):
        tfds = optional("tensorflow_datasets", "data", "config.data.source=tfds")
        where = f"config.data.name={name!r}, config.data.path={path!r}, config.data.split={split!r}"
        with blame(f"TFDS cannot read {where}"):  # it has many ways to say that a dataset is not there
            builder = (
                tfds.builder(name, data_dir=path or None) if name else tfds.builder_from_directory(path)
            )
            if name and not epath.Path(builder.data_dir).exists():
                raise UserError(f"{where}: there is no {builder.data_dir}; prepare the dataset there")
            decoders = {"image": tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split=split, decoders=decoders)
            features = builder.info.features
            self.captioned = "captions" in features  # as coco_captions has them
            self.num_classes = 0 if self.captioned else features["label"].num_classes
            self.classes = [] if self.captioned else list(features["label"].names)
            part = builder.info.splits[split]
        self._title = f"{builder.info.full_name} {split}"
        self._digest = f"{self._title}, {part.num_examples} examples in shards of {part.shard_lengths}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with files.reading():
            record = self._records[index]
            if self.captioned:
                captions = (text.decode() for text in record["captions"]["text"])
                return record["image"], some(captions)
            return record["image"], int(record["label"])

    def name(self, index: int) -> str:
        return f"{self._title}, example {index}"

    def digest(self) -> str:
        """What TFDS says of the dataset: name, version, split, examples in each shard."""
        return hashlib.sha256(self._digest.encode()).hexdigest()


BUNDLED = ("digits", "captioned_digits")  # these need no path
SOURCES = {
    "digits": digits,
    "captioned_digits": captioned_digits,
    "idx": idx_files,
    "caption_folder": lambda data, split: CaptionFolder(data.path, split),
    "webdataset": lambda data, split, *index: TarSource(data.path, split, *index),
    "folder": lambda data, split: FolderSource(data.path, split),
    "tfds": lambda data, split: TfdsSource(data.path, data.name, split),
    "array_record": lambda data, split: records.RecordSource(data.path, split),
}
