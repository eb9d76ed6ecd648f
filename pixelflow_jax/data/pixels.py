"""The one way in for pixels: which files are images, their sizes, and uint8 RGB as a viewer shows it.

Sources, `pack`, `evaluate`, the pictures that `sample` starts from, and buckets all come through here.
"""

import collections
import contextlib
import io
import logging
import os
import struct
import warnings
from collections.abc import Iterable
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from pixelflow_jax.common import files

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", module="PIL")  # odd EXIF blocks and palettes are no trouble to us

Size = tuple[int, int]  # (height, width) in pixels
BEHIND = (255, 255, 255, 255)  # what transparent pixels are laid over, as img2dataset does

# Pillow's decoders of pixels, the usual first. Not those that start other programs (EPS), draw (WMF) or
# only know a kind (HDF5, MPEG).
_WANTED = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF JPEG2000 DIB ICO ICNS CUR PCX DCX QOI DDS PSD SGI SUN"
_WANTED += " XBM XPM MSP IM BLP FTEX FLI GBR PIXAR TGA"
Image.init()
FORMATS = tuple(name for name in _WANTED.split() if name in Image.OPEN)
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")
)

# Folders and files of systems, besides the hidden ones: archives, network disks, Windows
_SYSTEM = (
    "__macosx lost+found thumbs.db ehthumbs.db desktop.ini $recycle.bin recycler #recycle #snapshot"
)
_SYSTEM += " @eadir @recycle @recently-snapshot @tmp"
SYSTEM = frozenset([*_SYSTEM.split(), "system volume information", "icon\r"])

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation
_KEY_SCALE = {"L;2": 85, "L;4": 17}  # PNG's transparent grey, as stored, to that of the pixels


class BrokenImage(OSError):
    """An image that cannot be decoded; the message says why."""


def is_left_behind(path: str) -> bool:
    """Whether a system left this file, or a folder on the way to it: hidden ones, __MACOSX."""
    return any(
        part.startswith(".") and part not in (".", "..") or part.lower() in SYSTEM
        for part in path.split("/")
    )


def is_image(path: str) -> bool:
    """Whether a file counts as an image: by its suffix, in any case."""
    return os.path.splitext(path)[1].lower() in SUFFIXES and not is_left_behind(path)


def image_files(root: str) -> list[str]:
    """Image files below a folder, relative to it, in torchvision's order; logs what is left out."""
    names = [where + name for where, found in files.walk(root) for name in found]
    report_left_out(root, collections.Counter(kinds_left_out(names)))
    return [name for name in names if is_image(name)]


def kinds_left_out(names: Iterable[str]) -> list[str]:
    """The suffixes of those files that people put there and that are no images."""
    rest = (name for name in names if not is_image(name) and not is_left_behind(name))
    return [os.path.splitext(name)[1].lower() or "no suffix" for name in rest]


def report_left_out(root: str, kinds: collections.Counter) -> None:
    """Logs how many files of which kinds are not taken as images."""
    if kinds:
        listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(10))
        log.warning("%s: %d files are not taken as images: %s", root, kinds.total(), listed)


def decode(data: bytes | np.ndarray | Image.Image) -> Image.Image:
    """RGB as a viewer shows it; of an animation, the first frame.

    Turned as EXIF says; transparent pixels over BEHIND; 16 bits and floats in [0, 1] scaled to 8 bits.
    Colour profiles are not applied.

    Args:
      data: an encoded image; pixels [H, W], [H, W, 1 to 4], uint8, uint16 or floating; Pillow's.

    Raises:
      BrokenImage: whatever is wrong with the data, floats outside [0, 1] and 32-bit numbers included.
    """
    try:
        if isinstance(data, np.ndarray):
            return _opaque(_of_array(data))
        image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data), formats=FORMATS)
        tiles = getattr(image, "tile", None)
        image.load()
        if image.mode != "RGB" or "transparency" in image.info:
            turn, image = _orientation(image), _opaque(image, _raw_mode(tiles))
        else:
            turn = _orientation(image)
        if turn in _TURNS:
            image = image.transpose(_TURNS[turn])
            image.info.clear()  # it is not to be turned again
        return image
    except BrokenImage:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise BrokenImage(f"{type(error).__name__}: {error}") from error


def read_size(data: bytes | IO[bytes] | np.ndarray) -> Size:
    """(height, width) of what `decode` gives, from the header alone: the first bytes will do.

    PNG files may say after the pixels how they are turned; that is seen where `data` goes so far.
    Raises whatever Pillow does where that cannot be read.
    """
    if isinstance(data, np.ndarray):
        return data.shape[:2]
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    with Image.open(file, formats=FORMATS) as image:
        if image.format == "PNG" and "exif" not in image.info and (late := _exif_chunk(file)):
            image.info["exif"] = late
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def _exif_chunk(file: IO[bytes]) -> bytes | None:
    """That of a PNG file, which may stand behind the pixels."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            return file.read(length)
        file.seek(length + 4, os.SEEK_CUR)
    return None


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where it is not there or makes no sense. TIFF files are turned by Pillow."""
    with contextlib.suppress(Exception):  # a damaged EXIF block is no damaged image
        if image.format != "TIFF":
            # not PNG's own getexif, which decodes the image
            turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            return turn if turn in _TURNS else 1
    return 1


def _raw_mode(tiles: list | None) -> str:
    """How a file has its pixels, in Pillow's words such as "RGB;16B"; "" where that does not matter."""
    args = tiles[0][3] if tiles else ""
    args = args[0] if isinstance(args, tuple) and args else args
    return args if isinstance(args, str) else ""


def _opaque(image: Image.Image, raw: str = "") -> Image.Image:
    """RGB of any mode; `raw` is the file's (see _raw_mode)."""
    key = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if values.dtype == np.int32 and (image.format not in ("PPM", "PNG") or raw == "I;16S"):
            raise BrokenImage("its pixels are 32-bit integers, of which nobody knows the range")
        image = Image.fromarray(_to_8_bits(values, 4095 if raw == "I;12" else 65535))
        if key is not None:
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    elif isinstance(key, int) and raw in _KEY_SCALE:
        image.info["transparency"] = key * _KEY_SCALE[raw]
    elif isinstance(key, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(x >> 8 for x in key)
    if image.mode.endswith("a"):  # colours that are multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BEHIND), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_array(values: np.ndarray) -> Image.Image:
    if values.ndim not in (2, 3) or values.ndim == 3 and values.shape[2] > 4 or not values.size:
        raise BrokenImage(f"pixels are [H, W] or [H, W, 1 to 4], not {list(values.shape)}")
    if values.dtype.kind != "f" and values.dtype not in (np.uint8, np.uint16):
        raise BrokenImage(f"its pixels are {values.dtype}; uint8, uint16 and floats are taken")
    if values.dtype != np.uint8:
        values = _to_8_bits(values, 65535)
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def _to_8_bits(values: np.ndarray, top: int) -> UInt8[np.ndarray, "..."]:
    """Floats in [0, 1], or whole numbers up to `top`, to 0..255. Raises BrokenImage for other floats."""
    if values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise BrokenImage(f"its pixels are floats from {low:.4g} to {high:.4g}; 0 to 1 is taken")
        return np.round(values * 255).astype(np.uint8)
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
