"""From an encoded image to uint8 [resolution, resolution, 3], by Pillow."""

import io
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image

CROPS = ("none", "random", "center")
MARGIN = 1.125  # the short side becomes this many times the resolution before a random crop


class BrokenImage(Exception):
    """An image that cannot be decoded; the message says why."""


def decode(data: bytes | np.ndarray) -> Image.Image:
    """RGB; the first frame of an animation; 16-bit grey by its upper 8 bits.

    Raises:
      BrokenImage: whatever is wrong with the data.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks and palettes are no trouble to us
            image = Image.open(io.BytesIO(data))
            image.load()
            if image.mode == "I" or image.mode.startswith("I;16"):
                # convert() would clip these at 255
                wide = np.asarray(image).astype(np.int64)
                image = Image.fromarray(np.clip(wide >> 8, 0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise BrokenImage(f"{type(error).__name__}: {error}") from error


def random_crop(image: Image.Image, resolution: int, rng: np.random.Generator) -> Image.Image:
    """A random square of the image with its short side at 1.125 x resolution (Lanczos).

    Only the square is computed: Pillow's `box` gives the pixels that cropping the whole resized
    image would.
    """
    width, height = image.size
    short = int(MARGIN * resolution)
    if width <= height:
        new = (short, max(int(short * height / width), short))
    else:
        new = (max(int(short * width / height), short), short)
    left, top = (int(rng.integers(size - resolution + 1)) for size in new)
    x, y = width / new[0], height / new[1]
    box = (left * x, top * y, (left + resolution) * x, (top + resolution) * y)
    box = (*box[:2], min(box[2], width), min(box[3], height))  # rounding may step over the edge
    return image.resize((resolution, resolution), Image.LANCZOS, box=box)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's centre crop: halved by a box filter while it can be, bicubic the rest of the way."""
    while min(image.size) >= 2 * resolution:
        image = image.resize(tuple(size // 2 for size in image.size), Image.BOX)
    scale = resolution / min(image.size)
    new = tuple(round(size * scale) for size in image.size)
    left, top = ((size - resolution) // 2 for size in new)
    if max(new) > 8 * resolution:  # a thin strip: compute the square alone
        x, y = image.size[0] / new[0], image.size[1] / new[1]
        box = (left * x, top * y, (left + resolution) * x, (top + resolution) * y)
        return image.resize((resolution, resolution), Image.BICUBIC, box=box)
    image = image.resize(new, Image.BICUBIC)
    return image.crop((left, top, left + resolution, top + resolution))


def transform(
    data: bytes | np.ndarray, resolution: int, crop: str, flip: bool, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes, crops (`crop` is one of CROPS) and mirrors half of the images if `flip`.

    Raises:
      BrokenImage: if the data is no image, or has another size and crop is "none".
    """
    if crop == "none" and isinstance(data, np.ndarray) and data.shape == (resolution, resolution, 3):
        pixels = data
    else:
        image = decode(data)
        if crop == "random":
            image = random_crop(image, resolution, rng)
        elif crop == "center":
            image = center_crop(image, resolution)
        elif image.size != (resolution, resolution):
            raise BrokenImage(f"it has {image.size[0]}x{image.size[1]} pixels; set config.data.crop")
        pixels = np.asarray(image)
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels
