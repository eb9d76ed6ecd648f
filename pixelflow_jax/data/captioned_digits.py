"""Captioned digits: scikit-learn's handwritten digits, coloured and placed, drawn from a seed.

A picture has five attributes: digit, colour, background, size and place. Its caption names them all, in
one of several wordings. Training never shows combinations with (digit + colour + background) mod 6 == 0,
though it shows every pair of them. The split "test" holds those alone, drawn from held-out scans.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from pixelflow_jax.data.base import Source, check_split
from pixelflow_jax.data.buckets import bucket_sizes
from pixelflow_jax.data.pixels import Size

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 230),
    "yellow": (240, 220, 40),
    "purple": (150, 40, 190),
    "white": (245, 245, 245),
}
RESERVED = {"orange": (240, 130, 20), "teal": (20, 150, 150)}  # words of the vocabulary, in no caption
BACKGROUNDS = {**COLOURS, "black": (10, 10, 10)}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = {"small": 5 / 8, "large": 3 / 4}  # side of the digit / shorter side of the picture
PLACES = {  # (row, column): 0 is the upper or left edge, 1 the lower or right edge
    "on the left": (0.5, 0.0),
    "on the right": (0.5, 1.0),
    "at the top": (0.0, 0.5),
    "at the bottom": (1.0, 0.5),
    "in the middle": (0.5, 0.5),
}
WORDINGS = (
    "a {size} {colour} {digit} on a {background} background, {place}",
    "a {background} background with a {size} {colour} {digit} {place}",
    "{place}, a {size} {colour} {digit} on a {background} background",
)
NAMES = {  # of every value of an attribute
    "digit": NUMBERS,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
}
LENGTH = 20_000  # pictures per epoch
HOLD_OUT_EVERY = 4  # every 4th scan is in the split "test"


@dataclasses.dataclass(frozen=True)
class Attributes:
    """What a caption says, as indices into NAMES."""

    digit: int
    colour: int
    background: int
    size: int
    place: int

    @property
    def held_out(self) -> bool:
        """Whether training never shows this digit in this colour on this background."""
        return (self.digit + self.colour + self.background) % len(COLOURS) == 0

    def words(self) -> dict[str, str]:
        """Return the names of the attributes."""
        return {attribute: names[getattr(self, attribute)] for attribute, names in NAMES.items()}

    def captions(self) -> tuple[str, ...]:
        """Return a caption in every wording."""
        return tuple(wording.format(**self.words()) for wording in WORDINGS)


def vocabulary() -> tuple[str, ...]:
    """Return all words and punctuation marks of the captions, sorted; then the reserved words.

    A parameter's initial value depends on its place, so the reserved ones, last, change no other's.
    """
    text = " ".join(part for names in (*NAMES.values(), WORDINGS) for part in names)
    for mark in ",:":
        text = text.replace(mark, f" {mark} ")
    return (*sorted({word for word in text.split() if "{" not in word}), *RESERVED)


def draw_attributes(rng: np.random.Generator, held_out: bool) -> Attributes:
    """Draw uniformly from the combinations that are, or are not, held out."""
    while True:
        found = Attributes(*(int(rng.integers(len(names))) for names in NAMES.values()))
        if found.held_out == held_out and found.colour != found.background:
            return found


def paint(
    scan: Float[np.ndarray, "8 8"], words: dict[str, str], size: Size
) -> UInt8[np.ndarray, "h w 3"]:
    """Return a scan in [0, 1] as a picture of (height, width) pixels, with the named attributes."""
    side = round(SIZES[words["size"]] * min(size))
    row, column = (
        round(part * (whole - side)) for part, whole in zip(PLACES[words["place"]], size, strict=True)
    )
    digit = Image.fromarray(np.round(255 * scan).astype(np.uint8)).resize((side, side), Image.BICUBIC)
    ink = np.zeros((*size, 1))
    ink[row : row + side, column : column + side, 0] = np.asarray(digit) / 255
    colour = {**COLOURS, **RESERVED}[words["colour"]]
    background = BACKGROUNDS[words["background"]]
    return np.round(ink * colour + (1 - ink) * background).astype(np.uint8)


class CaptionedDigits(Source):
    """Example i is a pure function of (split, i): a painted scan of the drawn digit, with captions.

    With max_aspect_ratio above 1, pictures have the sizes of the buckets. Raises UserError for a split
    other than "train" and "test".
    """

    captioned = True

    def __init__(self, data: ConfigDict, split: str):
        scans, labels = load_scans(split, "captioned_digits")
        self._sizes, self._held_out = bucket_sizes(data), split == "test"
        self.scans = [scans[labels == digit] / 16 for digit in range(len(NUMBERS))]

    def __len__(self) -> int:
        return LENGTH

    def attributes(self, index: int) -> Attributes:
        """Return what picture `index` shows."""
        return draw_attributes(np.random.default_rng((index, self._held_out)), self._held_out)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[str, ...]]:
        rng = np.random.default_rng((index, self._held_out))
        attributes = draw_attributes(rng, self._held_out)
        scans = self.scans[attributes.digit]
        scan = scans[rng.integers(len(scans))]
        size = self._sizes[rng.integers(len(self._sizes))]
        return paint(scan, attributes.words(), size), attributes.captions()

    def name(self, index: int) -> str:
        return f"captioned digit {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        return self.attributes(index).captions()


def load_scans(split: str, source: str) -> tuple[Float[np.ndarray, "n 8 8"], Int[np.ndarray, " n"]]:
    """Return scikit-learn's scans, from 0 to 16, and their digits, of "train" or "test".

    Raises UserError for another split, naming `source`.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    check_split(split, source)
    bundle = load_digits()
    chosen = (np.arange(len(bundle.target)) % HOLD_OUT_EVERY == 0) == (split == "test")
    return bundle.images[chosen], bundle.target[chosen]
