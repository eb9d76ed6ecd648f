"""Files: local and gs:// paths alike (epath), written whole or not at all, JSON settings."""

import contextlib
import json
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, Any

from etils import epath

from pixelflow_jax.errors import UserError, optional


@contextlib.contextmanager
def atomic_path(path: epath.PathLike, local: bool = False) -> Iterator[epath.Path]:
    """Yields a temporary name beside `path`, renamed to it when the block ends without an error.

    The folder is made if it is not there. With `local`, for writers that know local files only, the
    temporary name of a gs:// path is a local one, which is copied up at the end.
    """
    path = epath.Path(path)
    unique = f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    temporary = path.parent / unique
    if local and "://" in str(path):
        temporary = epath.Path(tempfile.gettempdir()) / unique
    if "://" not in str(path):  # buckets have no folders
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if temporary.parent == path.parent:
            temporary.replace(path)
        else:
            temporary.copy(path, overwrite=True)
    finally:
        if temporary.exists():
            temporary.unlink()


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that does not depend on the folder one is in; buckets' (gs://) are so already."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.absolute()


def check_text(name: str, text: str, is_path: bool = True) -> None:
    """Raises UserError if a flag or key called `name` cannot be what `text` says: a path, or words."""
    if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{name} is not UTF-8 text, or holds a zero byte: {text!r}")
    if is_path and "://" in text and not text.startswith("gs://"):
        raise UserError(f"{name}={text}: paths are local, or begin with gs://")


def walk(root: str, folder: str = "") -> list[tuple[str, list[str]]]:
    """(folder, names in it) of root/folder and all below, sorted as torchvision does.

    Folders are relative to root, with a "/" at their end, or "". Links are followed, but not up, and no
    folder is listed twice.
    """
    root = str(epath.Path(root))
    top, found = os.path.join(root, folder) if folder else root, {}
    if "://" in root:
        for path in epath.Path(top).rglob("*"):
            where, _, name = str(path)[len(root) + 1 :].rpartition("/")
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
    """Writes a file under a temporary name and renames it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def open_file(path: epath.PathLike) -> IO[bytes]:
    """A file to read; local ones without epath's overhead, as a loader reads many.

    Raises:
      OSError: if there is none, or it is a device: /dev/zero has no end.
    """
    if "://" in str(path):
        return epath.Path(path).open("rb")
    file = open(path, "rb")
    if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is a device, not a file")
    return file


def read_bytes(path: epath.PathLike) -> bytes:
    """A file's contents. Raises OSError as `open_file`."""
    with open_file(path) as file:
        return file.read()


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns whatever a storage library raises into an OSError, so that callers need to know one."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file, indented, keys in their order."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_lines(path: epath.PathLike) -> list[str]:
    """The lines of a UTF-8 file; line breaks of Unicode's own are text. Raises UnicodeDecodeError."""
    return [line.decode() for line in read_bytes(path).splitlines()]


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file. Raises UserError if it is missing or is not JSON."""
    path = epath.Path(path)
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None


def append_line(path: epath.PathLike, line: str) -> None:
    """Appends one line to a text file, creating it if need be (buckets cannot: they get it anew)."""
    path = epath.Path(path)
    if "://" in str(path):
        write_bytes(path, ((path.read_text() if path.exists() else "") + line).encode())
        return
    with path.open("a") as file:
        file.write(line)


def list_files(folder: epath.PathLike) -> list[str]:
    """Names in a folder, sorted; empty if there is no such folder. Raises UserError for a file.

    What `atomic_path` left of a write that was killed does not count.
    """
    folder = epath.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but a folder is needed")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if not (name.startswith(".") and name.endswith(".tmp"))]


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
