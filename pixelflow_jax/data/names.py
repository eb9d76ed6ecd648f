"""Names of examples: kept in little memory, and matched between images and captions."""

import array
import collections
import hashlib
import io
import os
import posixpath
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator

import numpy as np

from pixelflow_jax.common import listed, log

SPLITS = ("train", "val", "valid", "validation", "test")
LISTED = 5  # names that a message lists
PART = re.compile(r"[A-Za-z][\w-]*")  # part of an extension: "seg" in "1.seg.png", not 4 in "img.4.png"


class Strings:
    """Many texts in two arrays, as every worker would copy a list of a million item by item."""

    def __init__(self, texts: Iterable[str]):
        buffer, ends = io.BytesIO(), array.array("q")
        for text in texts:
            buffer.write(os.fsencode(text))
            ends.append(buffer.tell())
        self.data = np.frombuffer(buffer.getvalue(), np.uint8)
        self.ends = np.array(ends, "<i8")

    @classmethod
    def of(cls, data: np.ndarray, ends: np.ndarray) -> "Strings":
        """Return the texts whose `data` and `ends` were stored."""
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
        """Return the SHA-256 of all texts in order."""
        digest = hashlib.sha256(self.ends.data)
        digest.update(self.data.data)
        return digest.hexdigest()


def plain(path: str) -> str:
    """Return a path without "\\", "./" and the like."""
    return posixpath.normpath(path.replace("\\", "/"))


def loose(path: str) -> str:
    """Return what spellings of a path share: %20, case and composed letters do not count."""
    path = urllib.parse.unquote(plain(path)) if "%" in path else plain(path)
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


class Finder:
    """Find names, as people write them, among those that exist."""

    def __init__(self, names: Iterable[str]):
        self._names = set(names)
        self._loose: dict[str, list[str]] | None = None

    def __call__(self, asked: str) -> str | None:
        """Return the same name, or the only one with another spelling of it; None if there is none."""
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
    """Yield a path without its extension, then without further parts that may belong to it."""
    folder, base = os.path.split(name)
    base, extension = os.path.splitext(base)
    while True:
        yield os.path.join(folder, base)
        base, extension = os.path.splitext(base)
        if not PART.fullmatch(extension[1:]):
            return


def pair(images: Iterable[str], texts: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Return ({image: its text}, images without a text, images beside one that has the text).

    An image and its text share their name up to the last dot: "img.4.jpg" and "img.4.txt". Where there
    is no such text, an extension may have several parts: "1.input.jpg" takes "1.txt", and "1.jpg" takes
    "1.caption.txt", if nothing else can; "1.seg.png" is beside "1.jpg", which "1.txt" belongs to.
    """
    by_stem = {next(stems(text)): text for text in texts}
    find, found, rest = Finder(by_stem), {}, []
    for image in images:
        stem = next(stems(image))
        if stem in by_stem or (stem := find(stem)) is not None:
            found[image] = by_stem[stem]
        else:
            rest.append(image)
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
    """Log images that are left out because their caption belongs to another image of the same name."""
    if images:
        log.warning(
            "%s: %d images are left out, as their captions belong to others beside them: %s",
            *(where, len(images), listed(images, LISTED)),
        )
