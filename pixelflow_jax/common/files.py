"""Files: local and gs:// paths alike, written whole or not at all, JSON settings.

Paths are epath's, which Orbax and TFDS know too. What happens often goes past it to fsspec (gcsfs): a
bucket's objects appear whole under their names, and each of these functions costs one or two requests.
"""

import codecs
import contextlib
import io
import json
import os
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

from pixelflow_jax.common.errors import UserError, optional

# gcsfs keeps what it once listed for ever: a step or shard of another process would never be seen.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
LOCK = ".lock"  # in a folder that a process works in, see locks.py
BLOCK = 1 << 28  # bytes of an object that travel in one request
# Byte-order marks of texts; that of UTF-16 begins as that of UTF-32 does.
MARKS = (
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is of a bucket."""
    return "://" in str(path)


def _bucket(path: epath.PathLike) -> fsspec.AbstractFileSystem | None:
    """The client, epath's, of a gs:// path; None for a local one. Raises ImportError without gcsfs."""
    return backend.fsspec_backend.fs(path) if is_remote(path) else None


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns whatever a storage library raises into an OSError, so that callers need to know one."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def create(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yields a file to write; it is at `path`, whole, when the block ends without an error.

    Until then what was there stays. Folders are made if they are not there. Raises OSError.
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
        file.closed = True  # closing would write what there is
        raise
    with reading():
        file.close()


@contextlib.contextmanager
def atomic_path(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary local name, for writers that know local files only; as `create` otherwise."""
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
    """A path that does not depend on the folder one is in; buckets' (gs://) are so already."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.absolute()


def clean_text(name: str, text: str, is_path: bool = True) -> str:
    """What a flag or key called `name` says; of a path, "~" at its begin is the home folder.

    Raises:
      UserError: if it cannot be what it is to be: a path, or words.
    """
    if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{name} is not UTF-8 text, or holds a zero byte: {text!r}")
    if not is_path:
        return text
    if "://" in text and not re.match("gs://[^/]", text):
        raise UserError(f"{name}={text}: paths are local, or begin with gs://BUCKET")
    full = os.path.expanduser(text)
    if full.startswith("~"):
        raise UserError(
            f"{name}={text}: {text.partition('/')[0]} is no user's folder (./{text} is a name)"
        )
    return full


def walk(root: str, folder: str = "") -> list[tuple[str, list[str]]]:
    """(folder, names of the files in it) of root/folder and all below, sorted as torchvision does.

    Folders are relative to root, with a "/" at their end, or "". Links are followed, but not up, and no
    folder is listed twice. In a bucket this is one request for a thousand files, however deep; folders
    without files are not there. Files are not looked at. Raises OSError.
    """
    root = str(epath.Path(root))
    top, found = os.path.join(root, folder) if folder else root, {}
    if bucket := _bucket(root):
        skip = len(bucket._strip_protocol(root)) + 1
        with reading():
            for path in bucket.find(top):
                where, _, name = path[skip:].rpartition("/")
                if name:  # consoles mark a folder by an object "folder/"
                    found.setdefault(where, []).append(name)
    else:
        for place, names in _folders(top):
            found[os.path.relpath(place, root) if place != root else ""] = names
    return [(f"{where}/" if where else "", sorted(names)) for where, names in sorted(found.items())]


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, names) below a local folder: first those that no link leads to."""
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
                paths = (os.path.join(place, name) for name in below)
                links += [path for path in paths if os.path.islink(path) and not _leads_up(path)]
                yield place, names
        starts = links


def _leads_up(link: str) -> bool:
    """Whether a link is to a folder that it stands in, itself or further up."""
    target, here = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    return os.path.commonpath([target, here]) == target


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a file, whole or not at all. Raises OSError."""
    if bucket := _bucket(path):
        with reading():
            bucket.pipe_file(str(path), data, chunksize=BLOCK)
        return
    with create(path) as file:
        file.write(data)


def open_file(path: epath.PathLike) -> IO[bytes]:
    """A file to read; local ones without epath's overhead, as a loader reads many.

    An object of a bucket is read at once, or block by block if it is larger than BLOCK.

    Raises:
      OSError: if there is none, or it is a device: /dev/zero has no end.
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
    """A file's contents, or those from one place up to another, in one request.

    Raises OSError as `open_file`.
    """
    if bucket := _bucket(path):
        with reading():
            try:
                return bucket.cat_file(str(path), begin or None, end)
            except Exception as error:
                if "416" not in str(error) and "satisfiable" not in str(error):  # nothing is there
                    raise
                return b""
    with open_file(path) as file:
        file.seek(begin)
        return file.read() if end is None else file.read(end - begin)


def remove(path: epath.PathLike) -> None:
    """Removes a file, or a folder with all that is in it, if it is there. Raises OSError."""
    bucket, path = _bucket(path), epath.Path(path)
    with reading(), contextlib.suppress(FileNotFoundError):
        if bucket:
            bucket.rm(str(path), recursive=True)
        elif path.is_dir():
            path.rmtree()
        else:
            path.unlink()


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file, indented, keys in their order."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def decode_text(data: bytes) -> str:
    """Text as editors save it: UTF-8, or UTF-16 or 32 with a byte-order mark, which does not stay.

    Raises:
      UnicodeDecodeError: also for zero bytes, as UTF-16 without a mark has them.
    """
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    text = data.decode(encoding)
    if "\0" in text:
        place = data.index(b"\0")
        raise UnicodeDecodeError(encoding, data, place, place + 1, "a zero byte: save it as UTF-8")
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a text of Unix, Windows or old Macs; line breaks of Unicode's own are text.

    Of files that were put together each may bring its byte-order mark: lines lose it.
    """
    return [line.rstrip("\n").lstrip("\ufeff") for line in io.StringIO(text, newline=None)]


def read_lines(path: epath.PathLike) -> list[str]:
    """The lines of a text file. Raises UnicodeDecodeError as `decode_text`."""
    return split_lines(decode_text(read_bytes(path)))


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file. Raises UserError if it is missing or is not JSON."""
    path = epath.Path(path)
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None


def grow(path: epath.PathLike, data: bytes, begin: int) -> None:
    """Makes a file that holds the first `begin` bytes of `data` hold all of it.

    Whatever an earlier try has left behind these goes. Objects of a bucket cannot grow: they are
    written anew. Raises OSError.
    """
    if _bucket(path) or not begin or not os.path.exists(path):
        write_bytes(path, data)
        return
    with open(path, "r+b") as file:
        file.seek(begin)
        file.truncate()
        file.write(data[begin:])


def list_files(folder: epath.PathLike) -> list[str]:
    """Names in a folder, of files and folders, sorted; empty if there is no such folder.

    What a write that was killed left does not count, nor does a lock. Raises UserError for a file.
    """
    names = [name for name in _entries(folder) if name != LOCK]
    return [name for name in names if not (name.startswith(".") and name.endswith(".tmp"))]


def list_folders(folder: epath.PathLike) -> list[str]:
    """Names of the folders in a folder, sorted. Raises UserError as `list_files`."""
    return [name for name, is_folder in _entries(folder).items() if is_folder]


def _entries(folder: epath.PathLike) -> dict[str, bool]:
    """{name in a folder: whether it is a folder}, sorted; a bucket's by one listing."""
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
    """The folder `name`, or, for a hub id such as google/flan-t5-xl, where its files were downloaded to.

    Args:
      what: it is, for errors.
      patterns: of the files to download; none from folders within.

    Raises:
      UserError: if there is no such folder and the hub does not help either.
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
    except Exception as error:  # a dozen kinds: no library, no network, no such id
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} {name} is no folder, nor to be had from the hub: {reason}") from None
