"""Open the source that a config names (see base.py): bundled digits, folders, TFDS, ArrayRecord."""

import contextlib
import hashlib
import itertools

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from pixelflow_jax.common import UserError, blame, files, log, optional
from pixelflow_jax.data import idx, records
from pixelflow_jax.data.base import NO_SCAN, NamedSource, Scan, Source, split_root
from pixelflow_jax.data.captioned_digits import CaptionedDigits, load_scans
from pixelflow_jax.data.captions import CaptionFolder, TarSource
from pixelflow_jax.data.names import SPLITS, Strings
from pixelflow_jax.data.pixels import is_image, is_left_behind, report_left_out
from pixelflow_jax.data.texts import some

HELD_OUT = tuple(name for name in SPLITS if name != "train")


def open_source(data: ConfigDict, split: str | None = None, scan: Scan = NO_SCAN) -> Source:
    """Return the source that `config.data` names; `split` defaults to `data.split`.

    Raises UserError for an unknown source or missing files.
    """
    if data.source not in SOURCES:
        raise UserError(f"config.data.source must be one of {', '.join(SOURCES)}, got {data.source!r}")
    if data.source not in BUNDLED and not data.path and not (data.source == "tfds" and data.name):
        raise UserError(f"config.data.source={data.source} needs --config.data.path")
    local = data.source not in BUNDLED and not files.is_remote(data.path)
    if local and data.path and not epath.Path(data.path).exists():
        raise UserError(f"config.data.path={data.path} is not there: not a folder, nor a file")
    source = SOURCES[data.source](data, split or data.split, scan)
    if not len(source):
        raise UserError(f"config.data.path={data.path} holds no images")
    return source


def load_source(config: ConfigDict, split: str | None = None, scan: Scan = NO_SCAN) -> Source:
    """Return `open_source` if it fits the model; warn about classes that are never trained.

    Raises UserError as `open_source`; also if the source has captions and the model takes classes, the
    other way round, or if the source has more classes than the model.
    """
    data, source = config.data, open_source(config.data, split, scan)
    if source.captioned != bool(config.model.context_dim):
        found, takes = ("captions", "classes") if source.captioned else ("classes", "text")
        raise UserError(
            f"config.data.source={data.source} has {found}, but the model takes {takes} "
            f"(config.model.context_dim)"
        )
    classes = config.model.num_classes
    if classes and not source.captioned and not source.num_classes:
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
    """Return {number: name} of the classes that have examples, as far as the source knows that."""
    names, there = source.classes, source.present
    there = range(source.num_classes) if there is None else there
    return {int(label): names[label] if label < len(names) else str(label) for label in there}


def readable_captions(source: Source, index: int) -> tuple[str, ...]:
    """Return the captions of example `index` modulo the length, or of the next that can be read."""
    for step in range(len(source)):
        with contextlib.suppress(OSError):
            return source.captions((index + step) % len(source))
    raise UserError("no caption of the data can be read")


class ArraySource(Source):
    """Grey images in memory, all of one size, with their classes; `checksum` is that of their files."""

    def __init__(self, grey: UInt8[np.ndarray, "n h w"], labels: Int[np.ndarray, " n"], checksum=""):
        self.images, self.labels = np.repeat(grey[..., None], 3, axis=-1), labels.astype(np.int32)
        self.num_classes = int(self.labels.max(initial=-1)) + 1
        self.present = np.unique(labels).tolist()
        self._checksum = checksum

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"image {index}"

    def digest(self) -> str:
        return self._checksum


def digits(data: ConfigDict, split: str) -> ArraySource:
    """Return scikit-learn's 1,797 handwritten digits, resized to `resolution` (bicubic)."""
    scans, labels = load_scans(split, "digits")
    size = (data.resolution, data.resolution)
    scans = np.round(scans * (255 / 16)).astype(np.uint8)
    grey = [np.asarray(Image.fromarray(x).resize(size, Image.BICUBIC)) for x in scans]
    return ArraySource(np.stack(grey), labels)


def idx_files(data: ConfigDict, split: str) -> ArraySource:
    """Return the images of MNIST-format files, padded with black to `resolution`."""
    grey, labels = idx.read_split(data.path, split)
    checksum = hashlib.sha256(grey.tobytes() + labels.tobytes()).hexdigest()
    height, width = grey.shape[1:]
    if data.crop == "none":
        if max(height, width) > data.resolution:
            raise UserError(
                f"{data.path} has images of {height}x{width}, more than config.data.resolution="
                f"{data.resolution}; set --config.data.crop=center"
            )
        missing = [data.resolution - size for size in (height, width)]
        grey = np.pad(grey, [(0, 0), *((n // 2, n - n // 2) for n in missing)])
    return ArraySource(grey, labels, checksum)


class FolderSource(NamedSource):
    """A folder of class folders, as torchvision's ImageFolder lays them out, or of images alone.

    Classes are the sorted names of the folders below the root (or below root/split if that exists). The
    images of a class are all image files below its folder, sorted. Local or gs:// paths.
    """

    def __init__(self, path: str, split: str):
        root = split_root(path, split)
        folders = _folders(root)
        beside = folders.pop("", [])
        flat = [x for x in beside if is_image(x)]
        self.classes, names, labels = sorted(folders), [], []
        for label, name in enumerate(self.classes):
            found = [x for x in folders[name] if is_image(x)]
            if not found:
                log.warning("class folder %s/%s holds no images", root, name)
            names += found
            labels += [label] * len(found)
        if names and flat:
            log.warning("%s: %d images are in no class folder and not taken", root, len(flat))
        elif flat:
            names, labels, self.classes = flat, [0] * len(flat), []
        elif not self.classes:
            raise UserError(f"{root} holds no class folders, and no images")
        report_left_out(root, itertools.chain(beside, *folders.values()))
        super().__init__(root, Strings(names))
        self._labels = np.array(labels, np.int32)
        self.num_classes, self.present = len(self.classes), np.unique(self._labels).tolist()

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return files.read_bytes(self.name(index)), int(self._labels[index])

    def digest(self) -> str:
        return hashlib.sha256(super().digest().encode() + self._labels.tobytes()).hexdigest()


def _folders(root: str) -> dict[str, list[str]]:
    """Return {folder in the root: files below it, sorted}; "" stands for the root itself.

    A bucket is listed once, and has no empty folders.
    """
    found: dict[str, list[str]] = {"": []}
    if files.is_remote(root):
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
    """Return the images that training does not see and their split: the first that is there.

    Raises UserError if there is no such split.
    """
    problem = None
    for split in HELD_OUT:
        try:
            return load_source(config, split), split
        except UserError as error:
            problem = problem or error
    raise problem


class TfdsSource(Source):
    """A TFDS dataset prepared as ArrayRecord, read without TensorFlow; images stay encoded.

    `name` is a dataset name ("imagenet2012"), looked up in `path` (default: TFDS's own folder). Without
    a name, `path` is the version folder of a prepared dataset.
    """

    def __init__(self, path: str, name: str, split: str):
        tfds = optional("tensorflow_datasets", "data", "config.data.source=tfds")
        where = f"config.data.name={name!r}, config.data.path={path!r}, config.data.split={split!r}"
        with blame(f"TFDS cannot read {where}"):  # it has many errors for a missing dataset
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
        return hashlib.sha256(self._digest.encode()).hexdigest()


BUNDLED = ("digits", "captioned_digits")  # these need no path
SOURCES = {
    "digits": lambda data, split, scan: digits(data, split),
    "captioned_digits": lambda data, split, scan: CaptionedDigits(data, split),
    "idx": lambda data, split, scan: idx_files(data, split),
    "caption_folder": lambda data, split, scan: CaptionFolder(data.path, split),
    "webdataset": lambda data, split, scan: TarSource(data.path, split, scan),
    "folder": lambda data, split, scan: FolderSource(data.path, split),
    "tfds": lambda data, split, scan: TfdsSource(data.path, data.name, split),
    "array_record": lambda data, split, scan: records.RecordSource(data.path, split),
}
