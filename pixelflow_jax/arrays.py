"""npz files as streams: arrays that do not fit in memory, written and read row by row, no pickle."""

import contextlib
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from pixelflow_jax import files
from pixelflow_jax.errors import UserError, blame

BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError)
CHUNK = 1 << 24  # bytes read at a time


def write_npz(
    path: epath.PathLike, arrays: dict[str, tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray]]]
) -> None:
    """Writes {name: (shape, dtype, parts that follow one another along the first axis)}.

    The file is whole or not there, and equal arrays give equal bytes. numpy.load reads it.
    """
    with (
        files.create(path) as raw,
        zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, (shape, dtype, parts) in arrays.items():
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


def array_shapes(path: epath.PathLike) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{name: (shape, dtype)} of an npz file. Raises UserError if it is not a whole one."""
    with _opened(path) as archive:
        shapes = {}
        for member in archive.namelist():
            with archive.open(member) as file:
                shapes[member.removesuffix(".npy")] = _header(file)
        return shapes


def read_npz(path: epath.PathLike, name: str) -> np.ndarray:
    """One array of an npz file. Raises UserError if it is not whole, or has no such array."""
    shape, dtype = _shape(path, name)
    with _opened(path) as archive, archive.open(f"{name}.npy") as file:
        _header(file)
        return np.frombuffer(file.read(), dtype).reshape(shape).copy()


def rows(path: epath.PathLike, name: str, size: int) -> Iterator[np.ndarray]:
    """An array of an npz file, `size` rows at a time. Raises UserError as `read_npz` does."""
    shape, dtype = _shape(path, name)
    a_row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    with _opened(path) as archive, archive.open(f"{name}.npy") as file:
        _header(file)
        for begin in range(0, shape[0], size):
            count = min(size, shape[0] - begin)
            data = bytearray()
            while len(data) < count * a_row:
                part = file.read(min(CHUNK, count * a_row - len(data)))
                if not part:
                    raise EOFError(f"{name} ends early")
                data += part
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


class Stream:
    """Reads forwards through an array of an npz file; from the begin again where it must go back."""

    def __init__(self, path: epath.PathLike, name: str):
        self._path, self._name, self._at, self._rows = path, name, 0, None

    def read(self, begin: int, end: int) -> np.ndarray:
        """Rows begin to end. Raises UserError as `read_npz` does."""
        if self._rows is None or begin < self._at:
            self._rows, self._at = rows(self._path, self._name, 1), 0
        while self._at < begin:
            next(self._rows)
            self._at += 1
        parts = [next(self._rows) for _ in range(end - begin)]
        self._at = end
        return np.concatenate(parts)


def _shape(path: epath.PathLike, name: str) -> tuple[tuple[int, ...], np.dtype]:
    shapes = array_shapes(path)
    if name not in shapes:
        raise UserError(f"{path} has no array {name!r}; it has {', '.join(shapes) or 'none'}")
    return shapes[name]


def _header(file) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"npy version {version} is not known")
    shape, fortran, dtype = read[version](file)
    if fortran and len(shape) > 1:
        raise ValueError("an array is stored column by column (Fortran order)")
    if dtype.hasobject:
        raise ValueError("an array holds Python objects, which are not read (they could run code)")
    return shape, dtype


@contextlib.contextmanager
def _opened(path: epath.PathLike) -> Iterator[zipfile.ZipFile]:
    """The open file; whatever breaks while reading is a UserError with its name."""
    with blame(f"{path} is not a whole npz file", BROKEN):
        if not epath.Path(path).exists():
            raise UserError(f"{path} does not exist")
        with files.open_file(path) as raw, zipfile.ZipFile(raw) as archive:
            yield archive
