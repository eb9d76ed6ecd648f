"""Read MNIST-format (IDX) files, plain or .gz: http://yann.lecun.com/exdb/mnist, "file formats"."""

import gzip
import zlib

import numpy as np
from etils import epath
from jaxtyping import UInt8

from pixelflow_jax.common import UserError, blame, files
from pixelflow_jax.data.base import check_split

PREFIXES = {"train": "train", "test": "t10k"}
UINT8 = 0x08


def read_split(folder: str, split: str) -> tuple[UInt8[np.ndarray, "n h w"], UInt8[np.ndarray, " n"]]:
    """Return the images and labels of "train" or "test".

    Raises UserError if a file is missing or damaged, or the two do not fit each other.
    """
    check_split(split, "idx files")
    images, labels = (
        read_idx(_find(folder, f"{PREFIXES[split]}-{kind}"), dims)
        for kind, dims in (("images", 3), ("labels", 1))
    )
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} {split} images, but {len(labels)} labels")
    return images, labels


def _find(folder: str, prefix: str) -> epath.Path:
    """Return the file of a folder whose name begins with `prefix`."""
    path = epath.Path(folder)
    found = [p for p in path.iterdir() if p.name.startswith(prefix)] if path.is_dir() else []
    if not found:
        raise UserError(f"config.data.path={folder} holds no {prefix}-idx*-ubyte or .gz of it")
    return min(found, key=lambda p: (p.suffix == ".gz", p.name))  # plain files read faster


def read_idx(path: epath.PathLike, dims: int) -> UInt8[np.ndarray, "..."]:
    """Return a uint8 array of `dims` dimensions. Raises UserError if the file is not such an array."""
    path = epath.Path(path)
    with blame(f"{path} cannot be read", (OSError, EOFError, zlib.error)):
        data = files.read_bytes(path)
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    header = 4 + 4 * dims
    if len(data) < header or data[:4] != bytes([0, 0, UINT8, dims]):
        raise UserError(f"{path} is not an IDX file of uint8 with {dims} dimensions")
    shape = tuple(np.frombuffer(data, ">u4", dims, offset=4).astype(int))
    if len(data) != header + np.prod(shape):
        raise UserError(
            f"{path} is damaged: {len(data)} bytes where {shape} needs {header + np.prod(shape)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
