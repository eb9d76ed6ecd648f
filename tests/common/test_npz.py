"""npz files: what numpy reads, ours reads, but for Python objects."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelflow_jax.common import UserError, arrays

DTYPES = ("u1", ">u2", "<i8", ">f4", "f8", "f2", "?", "c8", "S3", "U2", "i2,f4", "V0")
NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\."), min_size=1, max_size=8
)


def npy(array: np.ndarray, version: tuple[int, int], pickled: bool = False) -> bytes:
    """A member's bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=pickled)
    return buffer.getvalue()


@st.composite
def members(draw):
    """{name: array} with orders, dtypes and shapes of all kinds."""
    found = {}
    for name in draw(st.sets(NAMES, min_size=1, max_size=3)):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        data = rng.integers(0, 2, int(np.prod(shape)) * dtype.itemsize, np.uint8).tobytes()
        found[name] = np.array(np.ndarray(shape, dtype, data), order=draw(st.sampled_from("CF")))
    return found


@settings(max_examples=60, deadline=None)
@given(
    members(),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    st.sampled_from(["", "object", "text", "other version", "damaged", "unknown names"]),
    st.booleans(),
    st.integers(1, 3),
)
def test_what_numpy_reads_is_read(tmp_path_factory, found, compression, version, beside, suffix, size):
    """Catches an order, dtype, npy version, compression or name that numpy reads and ours refuses, and
    any member beside the one that is asked for that keeps it from being read."""
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    extra = {
        "": None,
        "object": npy(np.array(["a", None], object), version, pickled=True),
        "text": b"no array",
        "other version": b"\x93NUMPY\x09\x00" + bytes(80),
        "damaged": npy(np.arange(99), version)[:-9],
        "unknown names": npy(np.zeros(2, [("\u00e4\u4e00", "i4")]), (3, 0)),
    }[beside]
    with zipfile.ZipFile(path, "w", compression) as archive:
        if extra is not None:
            archive.writestr("beside.txt" if beside == "text" else "beside!.npy", extra)
        for name, array in found.items():
            archive.writestr(f"{name}.npy" if suffix else name, npy(array, version))
    with np.load(path) as theirs:
        for name in found:
            ours, right = arrays.read_npz(path, name), theirs[name]
            assert ours.dtype == right.dtype and ours.shape == right.shape
            assert ours.tobytes() == right.tobytes() and ours.flags.writeable
            assert arrays.array_shapes(path, name, "absent") == {name: (right.shape, right.dtype)}
            if right.ndim:
                parts = list(arrays.rows(path, name, size))
                assert all(len(part) <= size and part.shape[1:] == right.shape[1:] for part in parts)
                assert b"".join(part.tobytes() for part in parts) == right.tobytes()


class Trap:
    """What unpickling it runs."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize("version", [(1, 0), (3, 0)])
def test_no_pickle_is_read(tmp_path, version):
    """Catches objects that are unpickled, in an array that is asked for or beside it."""
    header = npy(np.array([None], object), version, pickled=True)
    head = header[: header.index(b"\n") + 1]
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("trap.npy", head + pickle.dumps(np.array([Trap()], object)))
        archive.writestr("arr_0.npy", npy(np.arange(3), version))
    assert arrays.read_npz(tmp_path / "x.npz", "arr_0").tolist() == [0, 1, 2]
    assert arrays.array_shapes(tmp_path / "x.npz").keys() == {"trap", "arr_0"}
    for read in (arrays.read_npz, lambda path, name: list(arrays.rows(path, name, 1))):
        with pytest.raises(UserError, match="Python objects"):
            read(tmp_path / "x.npz", "trap")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_is_said(tmp_path, compression):
    """Catches a byte that was changed, or a file cut short, unnoticed or with a traceback."""
    path, rng = tmp_path / "x.npz", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", npy(rng.integers(0, 255, (4, 30), np.uint8), (1, 0)))
        end = archive.fp.tell()
    whole = path.read_bytes()
    for place in range(30, end, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        for read in (arrays.read_npz, lambda path, name: list(arrays.rows(path, name, 3))):
            with pytest.raises(UserError, match="x.npz"):
                read(path, "arr_0")
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match="not a whole npz file"):
        arrays.array_shapes(path)
