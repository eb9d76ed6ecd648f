"""What every source of examples offers to loaders and to `pack`."""

import dataclasses
from collections.abc import Callable

import numpy as np
from etils import epath

from pixelflow_jax.common import UserError, files
from pixelflow_jax.data.names import SPLITS, Strings


@dataclasses.dataclass(frozen=True)
class Scan:
    """How data are read for the first time: `workdir` keeps the result, `watch` is told of progress."""

    workdir: epath.Path | None = None
    watch: Callable[[str], None] = lambda what: None


NO_SCAN = Scan()


class Source:
    """Random access to images and their labels, in a fixed order.

    `source[i]` is (data, label). The data is an encoded image as bytes, or uint8 [H, W, 3]. The label is
    a class or, if the source is `captioned`, a tuple of captions, of which each step draws one.

    Attributes:
      num_classes: how many classes there are; 0 without classes.
      captioned: whether labels are captions.
      classes: names of all classes, where they are known.
      present: numbers of the classes that have examples; None where that is not known.
    """

    num_classes = 0
    captioned = False
    classes: list[str] = []
    present: list[int] | None = None

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int | tuple[str, ...]]:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return what messages call example `index`: its file, or its place."""
        raise NotImplementedError

    def head(self, index: int, size: int) -> bytes | np.ndarray:
        """Return at least the first `size` bytes of an image, or its pixels."""
        return self[index][0]

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of an example, without its image where that is possible.

        Raises OSError if they cannot be read, or all are blank.
        """
        return self[index][1]

    def digest(self) -> str:
        """Return a digest of the examples, independent of their location; "" if it is not known."""
        return ""


class NamedSource(Source):
    """A source whose examples have names below a root folder, local or gs://."""

    def __init__(self, root: str, names: Strings):
        self.root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    def head(self, index: int, size: int) -> bytes:
        return files.read_bytes(self.name(index), 0, size)

    def name(self, index: int) -> str:
        return f"{self.root}/{self._names[index]}"

    def digest(self) -> str:
        return self._names.digest()


def check_split(split: str, source: str) -> None:
    """Raise UserError for a split other than "train" and "test"."""
    if split not in ("train", "test"):
        raise UserError(f"config.data.split must be train or test for {source}, got {split!r}")


def split_root(path: str, split: str) -> str:
    """Return the folder of a split: path/split, or `path` for "train" if no split has a folder there.

    Raises UserError if there is no such folder.
    """
    root = epath.Path(path)
    if not root.is_dir():
        raise UserError(f"config.data.path={path} is not a folder")
    if (root / split).is_dir():
        return str(root / split)
    folders = files.list_folders(root)
    there = [name for name in SPLITS if name in folders]
    if there or split != "train":
        raise UserError(
            f"config.data.split={split!r}: there is no {path}/{split}; splits there: "
            f"{', '.join(there) or 'none'}"
        )
    return str(root)
