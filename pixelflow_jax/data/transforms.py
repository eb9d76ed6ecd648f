"""Turn an encoded image into the pixels of a training example, with Pillow."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pixelflow_jax.data.pixels import BrokenImage, Size, decode

MARGIN = 1.125  # scale, relative to the least one, of an image before a random crop


def random_crop(image: Image.Image, size: Size, rng: np.random.Generator) -> Image.Image:
    """Return a random crop of (height, width) from the image at 1.125 x its covering size (Lanczos).

    Only the crop is computed: Pillow's `box` gives the same pixels as cropping the resized image.
    """
    (width, height), (least_h, least_w) = image.size, (int(MARGIN * side) for side in size)
    if width * least_h <= height * least_w:
        new = (least_w, max(int(least_w * height / width), least_h))
    else:
        new = (max(int(least_h * width / height), least_w), least_h)
    left, top = (int(rng.integers(n - side + 1)) for n, side in zip(new, size[::-1], strict=True))
    x, y = width / new[0], height / new[1]
    box = (left * x, top * y, (left + size[1]) * x, (top + size[0]) * y)
    box = (*box[:2], min(box[2], width), min(box[3], height))  # rounding may step over the edge
    return image.resize(size[::-1], Image.LANCZOS, box=box)


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Return ADM's centre crop: halved with a box filter while possible, then bicubic."""
    wanted = size[::-1]  # (width, height), as in Pillow
    while all(have >= 2 * want for have, want in zip(image.size, wanted, strict=True)):
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = max(want / have for have, want in zip(image.size, wanted, strict=True))
    new = tuple(round(side * scale) for side in image.size)
    left, top = ((n - want) // 2 for n, want in zip(new, wanted, strict=True))
    if max(new) > 8 * max(wanted):  # a thin strip: compute the crop alone
        x, y = image.size[0] / new[0], image.size[1] / new[1]
        box = (left * x, top * y, (left + wanted[0]) * x, (top + wanted[1]) * y)
        return image.resize(wanted, Image.BICUBIC, box=box)
    image = image.resize(new, Image.BICUBIC)
    return image.crop((left, top, left + wanted[0], top + wanted[1]))


def nearest_size(sizes: Sequence[Size], height: int, width: int) -> Size:
    """Return the size whose aspect ratio is nearest to that of an image."""
    ratio = math.log(max(height, 1) / max(width, 1))
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def transform(
    data: bytes | np.ndarray, sizes: Sequence[Size], crop: str, flip: bool, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image decoded, cropped to the nearest of `sizes`, and mirrored half the time if `flip`.

    Raises BrokenImage if the data is not an image, or has another size and `crop` is "none".
    """
    if crop == "none" and isinstance(data, np.ndarray) and data.shape in [(*s, 3) for s in sizes]:
        pixels = data
    else:
        image = decode(data)
        size = nearest_size(sizes, image.height, image.width)
        if crop == "random":
            image = random_crop(image, size, rng)
        elif crop == "center":
            image = center_crop(image, size)
        elif image.size != size[::-1]:
            raise BrokenImage(f"it has {image.size[0]}x{image.size[1]} pixels; set config.data.crop")
        pixels = np.asarray(image)
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels
