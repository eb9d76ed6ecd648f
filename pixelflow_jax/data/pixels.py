"""The one way in for pixels: which files are images, their sizes, and uint8 RGB as a viewer shows it."""

import collections
import contextlib
import io
import os
import struct
import warnings
from collections.abc import Iterable
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from pixelflow_jax.common import files, log

warnings.filterwarnings("ignore", module="PIL")  # odd EXIF blocks and palettes do no harm

Size = tuple[int, int]  # (height, width) in pixels
BEHIND = (255, 255, 255, 255)  # background of transparent pixels, as in img2dataset

# Pillow's decoders of pixels, the usual ones first; without those that start other programs (EPS), draw
# (WMF) or only identify a format (HDF5, MPEG).
_WANTED = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF JPEG2000 DIB ICO ICNS CUR PCX DCX QOI DDS PSD SGI SUN"
_WANTED += " XBM XPM MSP IM BLP FTEX FLI GBR PIXAR TGA"
Image.init()
FORMATS = tuple(name for name in _WANTED.split() if name in Image.OPEN)
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")
)

# Files and folders of archivers, network disks and Windows, besides hidden ones
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
}  # by EXIF orientation
_KEY_SCALE = {"L;2": 85, "L;4": 17}  # from PNG's transparent grey, as stored, to the pixels'


class BrokenImage(OSError):
    """An image that cannot be decoded; the message says why."""


def is_left_behind(path: str) -> bool:
    """Return whether a file, or a folder on the way to it, is hidden or a system's, like __MACOSX."""
    return any(
        part.startswith(".") and part not in (".", "..") or part.lower() in SYSTEM
        for part in path.split("/")
    )


def is_image(path: str) -> bool:
    """Return whether a file counts as an image, by its suffix in any case."""
    return os.path.splitext(path)[1].lower() in SUFFIXES and not is_left_behind(path)


def image_files(root: str) -> list[str]:
    """Return the image files below a folder in torchvision's order; log what is left out."""
    names = [where + name for where, found in files.walk(root) for name in found]
    report_left_out(root, names)
    return [name for name in names if is_image(name)]


def report_left_out(root: str, names: Iterable[str]) -> None:
    """Log how many files of which kinds are neither images nor left behind by a system."""
    rest = (name for name in names if not is_image(name) and not is_left_behind(name))
    kinds = collections.Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in rest)
    if kinds:
        listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(10))
        log.warning("%s: %d files are not taken as images: %s", root, kinds.total(), listed)


def decode(data: bytes | np.ndarray | Image.Image, opaque: bool = False) -> Image.Image:
    """Return RGB as a viewer shows it; the first frame of an animation.

    Follows EXIF orientation, puts transparent pixels over BEHIND, and scales 16 bits and floats in
    [0, 1] to 8 bits. Colour profiles are not applied.

    Args:
      data: an encoded image; pixels [H, W] or [H, W, 1 to 4], uint8, uint16 or floating; or Pillow's.
      opaque: refuse transparency.

    Raises BrokenImage for whatever is wrong, including floats outside [0, 1] and 32-bit integers.
    """
    try:
        if isinstance(data, np.ndarray):
            return _opaque(_of_array(data), opaque=opaque)
        image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data), formats=FORMATS)
        raw = _raw_mode(getattr(image, "tile", None))  # which loading empties
        image.load()
        turn, image = _orientation(image), _opaque(image, raw, opaque)
        if turn in _TURNS:
            image = image.transpose(_TURNS[turn])
            image.info.clear()  # do not turn it again
        return image
    except BrokenImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise BrokenImage(f"{type(error).__name__}: {error}") from error


def read_size(data: bytes | IO[bytes] | np.ndarray) -> Size:
    """Return (height, width) of what `decode` gives, from the header: the first bytes are enough.

    A PNG's orientation may stand after its pixels; it counts if `data` extends so far. Raises whatever
    Pillow does if the size cannot be read.
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
    """Return the EXIF chunk of a PNG file, which may follow the pixels."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            return file.read(length)
        file.seek(length + 4, os.SEEK_CUR)
    return None


def _orientation(image: Image.Image) -> int:
    """Return EXIF's, 1 to 8; 1 if it is missing or invalid. Pillow turns TIFF files itself."""
    with contextlib.suppress(Exception):  # an image with a damaged EXIF block is intact
        if image.format != "TIFF":
            # PNG's own getexif would decode the image
            turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            return turn if turn in _TURNS else 1
    return 1


def _raw_mode(tiles: list | None) -> str:
    """Return Pillow's name for a file's pixel format, such as "RGB;16B", or ""."""
    args = tiles[0][3] if tiles else ""
    args = args[0] if isinstance(args, tuple) and args else args
    return args if isinstance(args, str) else ""


def _opaque(image: Image.Image, raw: str = "", opaque: bool = False) -> Image.Image:
    """Return RGB from any mode; `raw` is the format in the file (see _raw_mode).

    With `opaque`, raise BrokenImage for transparency.
    """
    key = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if values.dtype == np.int32 and (image.format not in ("PPM", "PNG") or raw == "I;16S"):
            raise BrokenImage("its pixels are 32-bit integers of unknown range")
        image = Image.fromarray(_to_8_bits(values, 4095 if raw == "I;12" else 65535))
        if key is not None:
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    elif isinstance(key, int) and raw in _KEY_SCALE:
        image.info["transparency"] = key * _KEY_SCALE[raw]
    elif isinstance(key, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(x >> 8 for x in key)
    if image.mode.endswith("a"):  # colours are premultiplied by alpha
        image = image.convert(image.mode.upper())
    if image.has_transparency_data and opaque:
        raise BrokenImage("it has an alpha channel: save it without")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BEHIND), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_array(values: np.ndarray) -> Image.Image:
    if values.ndim not in (2, 3) or values.ndim == 3 and values.shape[2] > 4 or not values.size:
        raise BrokenImage(f"pixels are [H, W] or [H, W, 1 to 4], not {list(values.shape)}")
    if values.dtype.kind != "f" and values.dtype not in (np.uint8, np.uint16):
        raise BrokenImage(f"its pixels are {values.dtype}; uint8, uint16 and floats are supported")
    if values.dtype != np.uint8:
        values = _to_8_bits(values, 65535)
    return Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)


def _to_8_bits(values: np.ndarray, top: int) -> UInt8[np.ndarray, "..."]:
    """Scale floats in [0, 1] or integers up to `top` to 0..255. Raises BrokenImage for other floats."""
    if values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise BrokenImage(f"its pixels are floats from {low:.4g} to {high:.4g}, not in [0, 1]")
        return np.round(values * 255).astype(np.uint8)
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
