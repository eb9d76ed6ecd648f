"""Image sets to evaluate or to compare with: npz files, folders, and a config's held-out images."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from jaxtyping import UInt8

from pixelflow_jax.common import UserError, arrays, blame, files
from pixelflow_jax.config import load_config
from pixelflow_jax.data.pixels import BrokenImage, decode, image_files
from pixelflow_jax.data.sources import held_out
from pixelflow_jax.data.transforms import center_crop

OURS = ("grid.png",)  # files of a sampling run that are not samples
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # ADM's names: pooled and spatial features


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one size; `name` is for messages.

    `read` returns the images from one index up to another, uint8 [n, H, W, 3].
    """

    name: str
    count: int
    read: Callable[[int, int], UInt8[np.ndarray, "n h w 3"]]

    def batches(self, size: int, process: int = 0, processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of one process: every `processes`-th batch."""
        for begin in range(process * size, self.count, processes * size):
            yield self.read(begin, min(begin + size, self.count))


def open_images(path: str, flag: str, resolution: int | None = None) -> ImageSet:
    """Open the images at `path`: an npz (arr_0), a folder, or a config's held-out images.

    With a resolution, images of a folder are cropped to this square as in training. Raises UserError,
    with the flag, if there are no images, or they have different sizes.
    """
    place = epath.Path(path)
    if path.endswith(".py"):
        return _of_config(path)
    if place.is_dir():
        if (place / "samples.npz").exists():
            return _of_npz(place / "samples.npz", flag)
        return _of_folder(place, flag, resolution)
    if not place.exists():
        raise UserError(f"--{flag}={path} does not exist")
    return _of_npz(place, flag)


def statistics_in(path: str) -> dict[str, np.ndarray]:
    """Return the statistics in an npz file by ADM's names; empty if there are none."""
    place = epath.Path(path)
    if not place.exists() or place.is_dir() or path.endswith(".py"):
        return {}
    found = arrays.array_shapes(place, *STATISTICS)
    if not {"mu", "sigma"} <= found.keys():
        return {}
    values = arrays.read_arrays(place, *found)
    for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean in values and values[cov].shape != values[mean].shape * 2:
            raise UserError(f"{path}: {cov} is {values[cov].shape}, {mean} {values[mean].shape}")
    return values


def has_images(path: str) -> bool:
    """Return whether a reference has images, and not only statistics."""
    place = epath.Path(path)
    return path.endswith(".py") or place.is_dir() or bool(arrays.array_shapes(place, "arr_0"))


def _of_npz(path: epath.Path, flag: str) -> ImageSet:
    shapes = arrays.array_shapes(path, "arr_0")
    shape, dtype = shapes.get("arr_0", ((), None))
    if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or not shape[0]:
        kind = "Python objects" if dtype is not None and dtype.hasobject else dtype
        has = f"that is {kind}, {shape}" if shapes else "there is no such array"
        raise UserError(f"--{flag}={path} needs uint8 images [N, H, W, 3] as arr_0; {has}")
    return ImageSet(str(path), shape[0], arrays.Stream(path, "arr_0").read)


def _of_folder(folder: epath.Path, flag: str, resolution: int | None) -> ImageSet:
    names = image_files(str(folder))
    found = [folder / name for name in sorted(names) if name not in OURS]
    if not found:
        raise UserError(f"--{flag}={folder} holds no images")

    def one(path: epath.Path) -> np.ndarray:
        with blame(f"--{flag}: {path} cannot be read", BrokenImage):
            image = decode(files.read_bytes(path))
        return np.asarray(image if resolution is None else center_crop(image, (resolution, resolution)))

    size = one(found[0]).shape

    def read(begin: int, end: int) -> np.ndarray:
        images = [one(path) for path in found[begin:end]]
        for path, image in zip(found[begin:end], images, strict=True):
            if image.shape != size:
                raise UserError(
                    f"--{flag}: {path} is {image.shape[0]}x{image.shape[1]}, {found[0]} "
                    f"{size[0]}x{size[1]}; add --resolution to crop all to one size"
                )
        return np.stack(images)

    return ImageSet(str(folder), len(found), read)


def _of_config(path: str) -> ImageSet:
    config = load_config(path)
    source, split = held_out(config)

    size = (config.data.resolution,) * 2

    def one(x: bytes | np.ndarray) -> np.ndarray:
        as_trained = isinstance(x, np.ndarray) and x.shape[:2] == size
        return x if as_trained else np.asarray(center_crop(decode(x), size))

    def read(begin: int, end: int) -> np.ndarray:
        return np.stack([one(source[i][0]) for i in range(begin, end)])

    return ImageSet(f"{path}, {split} split", len(source), read)
