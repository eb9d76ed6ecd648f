"""Names of examples: many in little memory, and the rules by which images find their captions."""

import array
import collections
import hashlib
import io
import logging
import os
import posixpath
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from pixelflow_jax.common import files
from pixelflow_jax.common.errors import UserError

log = logging.getLogger(__name__)
SPLITS = ("train", "val", "valid", "validation", "test")
LISTED = 5  # of the images that something is wrong with
PART = re.compile(r"[A-Za-z][\w-]*")  # of an extension: "seg" in "1.seg.png", not the 4 in "img.4.png"


class Strings:
    """Many texts in two arrays: a list of a million would be copied, one by one, into every worker."""

    def __init__(self, texts: Iterable[str]):
        buffer, ends = io.BytesIO(), array.array("q")
        for text in texts:
            buffer.write(os.fsencode(text))
            ends.append(buffer.tell())
        self.data = np.frombuffer(buffer.getvalue(), np.uint8)
        self.ends = np.array(ends, "<i8")

    @classmethod
    def of(cls, data: np.ndarray, ends: np.ndarray) -> "Strings":
        """Those of which `data` and `ends` were kept."""
        made = cls(())
        made.data, made.ends = data, ends
        return made

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        end = int(self.ends[index])
        begin = int(self.ends[index - 1]) if index % len(self.ends) else 0
        return os.fsdecode(self.data[begin:end].tobytes())

    def digest(self) -> str:
        """SHA-256 of all of them, in their order."""
        digest = hashlib.sha256(self.ends.data)
        digest.update(self.data.data)
        return digest.hexdigest()


def plain(path: str) -> str:
    """A path that may be written as on Windows, or with "./", as it is written here."""
    return posixpath.normpath(path.replace("\\", "/"))


def loose(path: str) -> str:
    """What the ways to write a path have in common: %20, case and composed letters do not count."""
    path = urllib.parse.unquote(plain(path)) if "%" in path else plain(path)
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


class Finder:
    """Finds names as people write them among those that are there."""

    def __init__(self, names: Iterable[str]):
        self._names = set(names)
        self._loose: dict[str, list[str]] | None = None

    def __call__(self, asked: str) -> str | None:
        """The name that is meant: the same one, or the only one that it is another way to write of."""
        for name in (asked, plain(asked)):
            if name in self._names:
                return name
        if self._loose is None:
            self._loose = collections.defaultdict(list)
            for name in self._names:
                self._loose[loose(name)].append(name)
        found = self._loose.get(loose(asked), ())
        return found[0] if len(found) == 1 else None


def stems(name: str) -> Iterator[str]:
    """A path without its extension, and then without the parts before that could belong to it."""
    folder, base = os.path.split(name)
    base, extension = os.path.splitext(base)
    while True:
        yield os.path.join(folder, base)
        base, extension = os.path.splitext(base)
        if not PART.fullmatch(extension[1:]):
            return


def pair(images: Iterable[str], texts: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """({image: its text}, images without a text, images that only stand beside another one).

    Both have one name up to the last dot: "img.4.jpg" and "img.4.txt". Where there is no such text,
    an extension may have several parts: "1.input.jpg" takes "1.txt" and "1.jpg" takes "1.caption.txt" if
    nothing else can; "1.seg.png" stands beside "1.jpg", whose text "1.txt" is.
    """
    by_stem = {next(stems(text)): text for text in texts}
    find, found, rest = Finder(by_stem), {}, []
    for image in images:
        stem = next(stems(image))
        if stem in by_stem or (stem := find(stem)) is not None:
            found[image] = by_stem[stem]
        else:
            rest.append(image)
    if not rest:
        return found, [], []
    owned = set(found.values())
    wanted, longer = collections.defaultdict(list), collections.defaultdict(list)
    for stem, text in by_stem.items():
        if text not in owned:
            for shorter in list(stems(f"{stem}.txt"))[1:]:
                longer[shorter].append(text)
    for image in rest:
        shorter = (by_stem[stem] for stem in stems(image) if stem in by_stem)
        longest = longer[next(stems(image))]
        wanted[next(shorter, longest[0] if len(longest) == 1 else "")].append(image)
    bare, beside = wanted.pop("", []), []
    for text, those in wanted.items():
        if text in owned:
            beside += those
        elif len(those) == 1:
            found[those[0]] = text
        else:
            bare += those
    return found, bare, beside


def say_beside(where: str, images: list[str]) -> None:
    """Logs that images are left out, as the caption belongs to another one of the same name."""
    if images:
        log.warning(
            "%s: %d images are left out, as their captions are of others beside them: %s",
            *(where, len(images), ", ".join(images[:LISTED])),
        )


def split_root(path: str, split: str) -> str:
    """The folder of a split: path/split; for "train" the path itself, if no split has a folder there."""
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
