"""Read and write npz files as streams, for arrays larger than memory; without pickle."""

import contextlib
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO

import numpy as np
from etils import epath

from pixelflow_jax.common import UserError, blame, files

BROKEN = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
          lzma.LZMAError)  # fmt: skip
CHUNK = 1 << 24  # bytes read at a time
Parts = tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray]]  # shape, dtype, parts along axis 0


def write_npz(path: epath.PathLike, arrays: Mapping[str, np.ndarray | Parts]) -> None:
    """Write {name: array, or (shape, dtype, consecutive parts along the first axis)}.

    The file appears whole or not at all, and equal arrays give equal bytes. numpy.load reads it.
    """
    with files.create(path) as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
        for name, x in arrays.items():
            shape, dtype, parts = x if isinstance(x, tuple) else (x.shape, x.dtype, [x])
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
            rows = 0
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    part = np.ascontiguousarray(part, dtype)
                    assert part.shape[1:] == tuple(shape[1:]), (name, part.shape, shape)
                    member.write(part.tobytes())
                    rows += len(part)
            assert rows == shape[0], (name, rows, shape)


def array_shapes(path: epath.PathLike, *names: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return {name: (shape, dtype)} of the arrays of an npz file, or of those among `names`.

    Raises UserError if the file is not a whole npz file, as far as these arrays show.
    """
    with _opened(path) as archive:
        there = _members(archive)
        chosen = [name for name in names if name in there] if names else _arrays(archive)
        return {name: _start(archive, name)[:2] for name in chosen}


def read_arrays(path: epath.PathLike, *names: str) -> dict[str, np.ndarray]:
    """Return the arrays `names` of an npz file, or all; in column order if they are stored so.

    Raises UserError if one of them is missing or incomplete, or holds Python objects.
    """
    with _opened(path) as archive:
        return {name: _whole(archive, name) for name in names or _arrays(archive)}


def read_npz(path: epath.PathLike, name: str) -> np.ndarray:
    """Return one array of an npz file. Raises UserError as `read_arrays`."""
    return read_arrays(path, name)[name]


def rows(path: epath.PathLike, name: str, size: int) -> Iterator[np.ndarray]:
    """Yield an array of an npz file, `size` rows at a time. Raises UserError as `read_arrays`.

    An array in column order is read whole, as its rows are spread over the file.
    """
    with _opened(path) as archive:
        shape, dtype, fortran, file = _start(archive, name)
        starts = range(0, shape[0], size)
        if fortran:
            whole = _whole(archive, name)
            yield from (np.ascontiguousarray(whole[begin : begin + size]) for begin in starts)
            return
        for begin in starts:
            part = _read(file, (min(size, shape[0] - begin), *shape[1:]), dtype)
            if begin == starts[-1]:
                file.read(1)  # at the end, zipfile compares the checksum
            yield part


class Stream:
    """Reads forwards through an array of an npz file; starts again to go back."""

    def __init__(self, path: epath.PathLike, name: str):
        self._path, self._name, self._at, self._rows = path, name, 0, None

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return the rows from begin to end. Raises UserError as `read_npz`."""
        if self._rows is None or begin < self._at:
            self._rows, self._at = rows(self._path, self._name, 1), 0
        while self._at < begin:
            next(self._rows)
            self._at += 1
        parts = [next(self._rows) for _ in range(end - begin)]
        self._at = end
        return np.concatenate(parts)


def _members(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return {array: member of the archive}; numpy reads members without the suffix too."""
    return {member.removesuffix(".npy"): member for member in archive.namelist()}


def _arrays(archive: zipfile.ZipFile) -> list[str]:
    return [name for name, member in _members(archive).items() if member.endswith(".npy")]


def _start(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype, bool, IO[bytes]]:
    """Return (shape, dtype, whether in column order, the member after its header)."""
    members = _members(archive)
    if name not in members:
        raise UserError(
            f"{archive.filename} has no array {name!r}; it has {', '.join(members) or 'none'}"
        )
    file = archive.open(members[name])
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"npy version {version} is not known")
    # Version 3 differs from 2 in the encoding of field names, which are not used here.
    read = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
    shape, fortran, dtype = getattr(np.lib.format, read)(file)
    return shape, dtype, fortran and len(shape) > 1, file


def _whole(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    shape, dtype, fortran, file = _start(archive, name)
    array = _read(file, shape[::-1] if fortran else shape, dtype)
    file.read(1)  # as above
    return array.T if fortran else array


def _read(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the next array of a member."""
    if dtype.hasobject:
        raise ValueError("an array holds Python objects, which are not read (they could run code)")
    size, data = math.prod(shape) * dtype.itemsize, bytearray()
    while len(data) < size:  # in chunks: a header may claim more than is there
        part = file.read(min(CHUNK, size - len(data)))
        if not part:
            raise EOFError("an array ends early")
        data += part
    return np.ndarray(shape, dtype, data)


@contextlib.contextmanager
def _opened(path: epath.PathLike) -> Iterator[zipfile.ZipFile]:
    """Yield the open file; errors while reading become a UserError with its name."""
    with blame(f"{path} is not a whole npz file", BROKEN):
        try:
            raw = files.open_file(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        with raw, zipfile.ZipFile(raw) as archive:
            archive.filename = str(path)
            yield archive
