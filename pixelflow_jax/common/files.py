"""Read and write files, on disks and in buckets (gs://) alike; each is written whole or not at all.

Paths are epath's, which Orbax and TFDS know too. Frequent operations bypass it and use fsspec (gcsfs): a
bucket's objects appear whole under their names, and each of these functions costs one or two requests.
"""

import codecs
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, Any

import fsspec
from etils import epath
from etils.epath import backend

from pixelflow_jax.common import UserError, optional

# gcsfs caches listings forever: a step or shard of another process would never be seen.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
LOCK = ".lock"  # in a folder that a process works in (see locks.py)
BLOCK = 1 << 28  # bytes of an object per request
# Byte-order marks of texts; UTF-32's come first, as UTF-16's are their beginnings.
MARKS = (
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def is_remote(path: epath.PathLike) -> bool:
    """Return whether a path is in a bucket: the one place that knows."""
    return "://" in str(path)


def _bucket(path: epath.PathLike) -> fsspec.AbstractFileSystem | None:
    """Return epath's client of a gs:// path; None for a local one. Raises ImportError without gcsfs."""
    return backend.fsspec_backend.fs(path) if is_remote(path) else None


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turn whatever a storage library raises into an OSError."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def create(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yield a file to write; it replaces `path`, whole, when the block ends without an error.

    Makes missing folders. Raises OSError.
    """
    if not (bucket := _bucket(path)):
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            yield file
        return
    file = bucket.open(str(path), "wb", block_size=BLOCK)
    try:
        yield file
    except BaseException:
        with contextlib.suppress(Exception):
            file.discard()
        file.closed = True  # closing would write what is there
        raise
    with reading():
        file.close()


@contextlib.contextmanager
def atomic_path(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yield a temporary local name, for writers that need local files; otherwise like `create`."""
    path = epath.Path(path)
    unique = f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    is_local = not _bucket(path)
    temporary = (path.parent if is_local else epath.Path(tempfile.gettempdir())) / unique
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if is_local:
            temporary.replace(path)
        else:
            with temporary.open("rb") as file, create(path) as copy:
                shutil.copyfileobj(file, copy, BLOCK)
    finally:
        temporary.unlink(missing_ok=True)


def absolute(path: epath.PathLike) -> epath.Path:
    """Return a path that does not depend on the working folder; gs:// paths never do."""
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()


def clean_text(name: str, text: str, is_path: bool = True) -> str:
    """Return the value of a flag or key called `name`; in a path, a leading "~" is the home folder.

    Raises UserError if the value cannot be a path, or text.
    """
    if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{name} is not UTF-8 text, or holds a zero byte: {text!r}")
    if not is_path:
        return text
    if is_remote(text) and not re.match("gs://[^/]", text):
        raise UserError(f"{name}={text}: paths are local, or begin with gs://BUCKET")
    full = os.path.expanduser(text)
    if full.startswith("~"):
        raise UserError(
            f"{name}={text}: {text.partition('/')[0]} is no user's folder (./{text} is a name)"
        )
    return full


def walk(root: str, folder: str = "") -> list[tuple[str, list[str]]]:
    """Return (folder, names of its files) for root/folder and all below, sorted as torchvision does.

    Folders are relative to root and end with "/", or are "". Links are followed, but not upwards, and no
    folder is listed twice. A bucket takes one request per thousand files, however deep, and has no
    folders without files. Files are not opened. Raises OSError.
    """
    root = str(epath.Path(root))
    top, found = os.path.join(root, folder) if folder else root, {}
    if bucket := _bucket(root):
        skip = len(bucket._strip_protocol(root)) + 1
        with reading():
            for path in bucket.find(top):
                where, _, name = path[skip:].rpartition("/")
                if name:  # consoles mark a folder with an object "folder/"
                    found.setdefault(where, []).append(name)
    else:
        for place, names in _folders(top):
            found[os.path.relpath(place, root) if place != root else ""] = names
    return [(f"{where}/" if where else "", sorted(names)) for where, names in sorted(found.items())]


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names) below a local folder, first those that no link leads to."""
    starts, seen = [top], set()
    while starts:
        links = []
        for start in sorted(starts):
            for place, below, names in os.walk(start):
                real = os.path.realpath(place)
                if real in seen:
                    below.clear()
                    continue
                seen.add(real)
                there = filter(os.path.islink, (os.path.join(place, name) for name in below))
                up = [real, *map(str, pathlib.Path(real).parents)]
                links += [link for link in there if os.path.realpath(link) not in up]
                yield place, names
        starts = links


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Write a file, whole or not at all. Raises OSError."""
    if bucket := _bucket(path):
        with reading():
            bucket.pipe_file(str(path), data, chunksize=BLOCK)
        return
    with create(path) as file:
        file.write(data)


def open_file(path: epath.PathLike) -> IO[bytes]:
    """Open a file to read, without epath's overhead.

    An object in a bucket is read at once, or block by block if it is larger than BLOCK. Raises OSError
    if the file does not exist, or is a device: /dev/zero has no end.
    """
    if bucket := _bucket(path):
        with reading():
            data = read_bytes(path, 0, BLOCK)
            if len(data) < BLOCK:
                return io.BytesIO(data)
            return bucket.open(str(path), block_size=BLOCK // 8, cache_type="readahead")
    file = open(path, "rb")
    if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is a device, not a file")
    return file


def read_bytes(path: epath.PathLike, begin: int = 0, end: int | None = None) -> bytes:
    """Return a file's bytes from `begin` to `end`, in one request. Raises OSError as `open_file`."""
    if bucket := _bucket(path):
        with reading():
            try:
                return bucket.cat_file(str(path), begin or None, end)
            except Exception as error:
                if "416" not in str(error) and "satisfiable" not in str(error):  # past the end
                    raise
                return b""
    with open_file(path) as file:
        file.seek(begin)
        return file.read() if end is None else file.read(end - begin)


def remove(path: epath.PathLike) -> None:
    """Remove a file, or a folder and its contents, if it exists. Raises OSError."""
    bucket, path = _bucket(path), epath.Path(path)
    with reading(), contextlib.suppress(FileNotFoundError):
        if bucket:
            bucket.rm(str(path), recursive=True)
        elif path.is_dir():
            path.rmtree()
        else:
            path.unlink()


def write_json(path: epath.PathLike, value: Any) -> None:
    """Write an indented JSON file, keys in their order."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def decode_text(data: bytes) -> str:
    """Decode text as editors save it: UTF-8, or UTF-16 or 32 with a byte-order mark, which is removed.

    Raises UnicodeDecodeError also for zero bytes, which UTF-16 without a mark has.
    """
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    text = data.decode(encoding)
    if "\0" in text:
        place = data.index(b"\0")
        raise UnicodeDecodeError(encoding, data, place, place + 1, "a zero byte: save it as UTF-8")
    return text


def split_lines(text: str) -> list[str]:
    """Split at the line breaks of Unix, Windows and old Macs, not at Unicode's own.

    Removes the byte-order marks that concatenated files leave at the beginning of lines.
    """
    return [line.rstrip("\n").lstrip("\ufeff") for line in io.StringIO(text, newline=None)]


def read_lines(path: epath.PathLike) -> list[str]:
    """Return the lines of a text file. Raises UnicodeDecodeError as `decode_text`."""
    return split_lines(decode_text(read_bytes(path)))


def read_json(path: epath.PathLike) -> Any:
    """Return the value in a JSON file. Raises UserError if it is missing or is not JSON."""
    path = epath.Path(path)
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None


def grow(path: epath.PathLike, data: bytes, begin: int) -> None:
    """Extend a file that holds the first `begin` bytes of `data` to all of it.

    Overwrites what an earlier attempt left after them. Objects in a bucket cannot grow: they are written
    anew. Raises OSError.
    """
    if _bucket(path) or not begin or not os.path.exists(path):
        write_bytes(path, data)
        return
    with open(path, "r+b") as file:
        file.seek(begin)
        file.truncate()
        file.write(data[begin:])


def list_files(folder: epath.PathLike) -> list[str]:
    """Return the sorted names in a folder, of files and folders; none if it does not exist.

    Leaves out locks and what killed writes left behind. Raises UserError if `folder` is a file.
    """
    names = [name for name in _entries(folder) if name != LOCK]
    return [name for name in names if not (name.startswith(".") and name.endswith(".tmp"))]


def list_folders(folder: epath.PathLike) -> list[str]:
    """Return the sorted names of the folders in a folder. Raises UserError as `list_files`."""
    return [name for name, is_folder in _entries(folder).items() if is_folder]


def _entries(folder: epath.PathLike) -> dict[str, bool]:
    """Return {name in a folder: whether it is a folder}, sorted; a bucket is listed once."""
    if not (bucket := _bucket(folder)):
        folder = epath.Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, but a folder is needed")
        entries = sorted(os.scandir(folder), key=lambda x: x.name) if folder.is_dir() else []
        return {entry.name: entry.is_dir() for entry in entries}
    place = bucket._strip_protocol(str(folder)).rstrip("/")
    try:
        with reading():
            found = bucket.ls(place, detail=True)
    except FileNotFoundError:
        return {}
    if any(entry["name"] == place and entry["type"] == "file" for entry in found):
        raise UserError(f"{folder} is a file, but a folder is needed")
    entries = {entry["name"].rstrip("/")[len(place) + 1 :]: entry["type"] for entry in found}
    return {name: kind == "directory" for name, kind in sorted(entries.items()) if name}


def folder_or_hub(name: str, what: str, patterns: Sequence[str]) -> epath.Path:
    """Return the folder `name` or, for a hub id such as google/flan-t5-xl, the folder of its download.

    A download has the files that match `patterns`, without subfolders. Raises UserError, which calls it
    `what`, if there is no such folder and the hub does not have it either.
    """
    folder = epath.Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{what} {name} is not a folder")
    try:
        hub = optional("huggingface_hub", "text", "a hub id")
        found = hub.snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"])
        return epath.Path(found)
    except Exception as error:  # many kinds: no library, no network, no such id
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} {name} is neither a folder nor on the hub: {reason}") from None
