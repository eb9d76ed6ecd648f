"""Captioned digits: scikit-learn's handwritten digits, coloured and placed, made on the fly from a seed.

A picture has five attributes: digit, colour, background, size and place. Its caption names them all, in
one of several wordings. A digit in a colour on a background is never seen in training where
(digit + colour + background) mod 6 == 0 (any two of them are): the split "test" holds those alone, drawn
from scans that are held out too.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from pixelflow_jax.common.errors import UserError
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
BACKGROUNDS = {**COLOURS, "black": (10, 10, 10)}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = {"small": 5 / 8, "large": 3 / 4}  # the digit's side, as a share of the picture's shorter one
PLACES = {  # (row, column): 0 is the upper or left edge, 1 the lower or right one
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
LENGTH = 20_000  # pictures an epoch of "train"


@dataclasses.dataclass(frozen=True)
class Attributes:
    """What a caption says, by places in NUMBERS, COLOURS, BACKGROUNDS, SIZES and PLACES."""

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
        """The attributes' names."""
        return {
            "digit": NUMBERS[self.digit],
            "colour": list(COLOURS)[self.colour],
            "background": list(BACKGROUNDS)[self.background],
            "size": list(SIZES)[self.size],
            "place": list(PLACES)[self.place],
        }

    def captions(self) -> tuple[str, ...]:
        """The picture in every wording."""
        return tuple(wording.format(**self.words()) for wording in WORDINGS)


def vocabulary() -> tuple[str, ...]:
    """All words and marks of the captions, sorted."""
    lists = (NUMBERS, COLOURS, BACKGROUNDS, SIZES, PLACES, WORDINGS)
    text = " ".join(part for names in lists for part in names)
    for mark in ",:":
        text = text.replace(mark, f" {mark} ")
    return tuple(sorted({word for word in text.split() if "{" not in word}))


def draw_attributes(rng: np.random.Generator, held_out: bool) -> Attributes:
    """Uniform over the combinations that are, or are not, held out."""
    while True:
        found = Attributes(
            *(int(rng.integers(len(x))) for x in (NUMBERS, COLOURS, BACKGROUNDS, SIZES, PLACES))
        )
        if found.held_out == held_out and found.colour != found.background:
            return found


def paint(
    scan: Float[np.ndarray, "8 8"], attributes: Attributes, size: Size
) -> UInt8[np.ndarray, "h w 3"]:
    """A scan in [0, 1] as a picture of (height, width) pixels."""
    words = attributes.words()
    side = round(SIZES[words["size"]] * min(size))
    row, column = (
        round(part * (whole - side)) for part, whole in zip(PLACES[words["place"]], size, strict=True)
    )
    digit = Image.fromarray(np.round(255 * scan).astype(np.uint8)).resize((side, side), Image.BICUBIC)
    ink = np.zeros((*size, 1))
    ink[row : row + side, column : column + side, 0] = np.asarray(digit) / 255
    colour, background = np.array(COLOURS[words["colour"]]), np.array(BACKGROUNDS[words["background"]])
    return np.round(ink * colour + (1 - ink) * background).astype(np.uint8)


class CaptionedDigits:
    """Example i is a pure function of (split, i): a scan of the drawn digit, painted, with captions.

    With max_aspect_ratio above 1, in one of the buckets' sizes.

    A captioned Source (see sources.py): `source[i]` is (picture, captions).
    """

    captioned, num_classes = True, 0

    def __init__(self, data: ConfigDict, split: str, scans, labels):
        self._sizes, self._held_out = bucket_sizes(data), split == "test"
        self.scans = [scans[labels == digit] for digit in range(len(NUMBERS))]

    def __len__(self) -> int:
        return LENGTH

    def attributes(self, index: int) -> Attributes:
        """What picture `index` shows."""
        return draw_attributes(np.random.default_rng((index, self._held_out)), self._held_out)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[str, ...]]:
        rng = np.random.default_rng((index, self._held_out))
        attributes = draw_attributes(rng, self._held_out)
        scans = self.scans[attributes.digit]
        scan = scans[rng.integers(len(scans))]
        size = self._sizes[rng.integers(len(self._sizes))]
        return paint(scan, attributes, size), attributes.captions()

    def name(self, index: int) -> str:
        return f"captioned digit {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        """Those of example `index`, without painting it."""
        return self.attributes(index).captions()


def captioned_digits(data: ConfigDict, split: str) -> CaptionedDigits:
    """The split "train" or "test". Raises UserError for another."""
    from sklearn.datasets import load_digits  # takes a second to import

    if split not in ("train", "test"):
        raise UserError(f"config.data.split must be train or test for captioned_digits, got {split!r}")
    bundle = load_digits()
    chosen = (np.arange(len(bundle.target)) % 4 == 0) == (split == "test")
    return CaptionedDigits(data, split, bundle.images[chosen] / 16, bundle.target[chosen])
