"""One process at a time in a folder: a lock of the kernel's on disks, a lease in buckets.

The kernel lets go of a lock when its process ends, whatever ended it; network disks (NFS) do so some
time after their host is gone. Where there are no locks, as in buckets, the holder writes the same file
again and again: who comes later waits until it has been silent for long enough, and is refused if not.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from pixelflow_jax.common import files
from pixelflow_jax.common.errors import Lost, UserError

log = logging.getLogger(__name__)
RENEW_SECONDS = 60.0  # between the writes of a lease
STALE_SECONDS = 150.0  # after which a lease that was not renewed has ended
LOOK_SECONDS = 5.0  # between looks at a lease
TRIES = 10  # at a lock, as the doctor holds one for a moment
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of some mounts


@contextlib.contextmanager
def held(folder: epath.PathLike, flag: str) -> Iterator[Callable[[], None]]:
    """Keeps other processes out of a folder, which is made where it is not there, to the block's end.

    Yields a function that raises Lost if another process has taken the folder since: a lease is lost by
    a process that could not renew it for minutes.

    Args:
      folder: local or gs://.
      flag: that names the folder, for errors.

    Raises:
      UserError: if a process is in it; it says which.
    """
    path = epath.Path(folder) / files.LOCK
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }
    if "://" not in str(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, flag)
        if descriptor is not None:
            try:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(me).encode())
                yield lambda: None
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
                os.close(descriptor)
            return
    with _leased(path, me, flag) as check:
        yield check


def holder(folder: epath.PathLike) -> str | None:
    """Which process is in a folder, in words; None if there is none."""
    path = epath.Path(folder) / files.LOCK
    found = _read(path)
    if found is None or "://" in str(folder):
        return _words(found) if _is_fresh(found) else None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _words(found)
    except OSError:  # no locks here
        return _words(found) if _is_fresh(found) else None
    finally:
        os.close(descriptor)
    return None


def _lock(path: epath.Path, flag: str) -> int | None:
    """The open, locked file; None where there are no locks. Raises UserError if another has it."""
    for _ in range(TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # children do not inherit it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # who held it has just removed the file
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except OSError as error:
            if error.errno in NO_LOCKS:
                os.close(descriptor)
                return None
            if not isinstance(error, BlockingIOError):
                os.close(descriptor)
                raise
        os.close(descriptor)
        time.sleep(0.05)
    raise _refusal(path, flag)


@contextlib.contextmanager
def _leased(path: epath.Path, me: dict[str, Any], flag: str) -> Iterator[Callable[[], None]]:
    """`held` with a file that is written again and again."""
    first, end = _read(path), time.monotonic() + STALE_SECONDS
    found = first
    while _is_fresh(found) and time.monotonic() < end:
        if found != first:
            raise _refusal(path, flag)
        if found is first:
            log.warning("%s: waiting until %s has been silent for long enough", path, _words(found))
        time.sleep(LOOK_SECONDS)
        found = _read(path)
    taken, ended = threading.Event(), threading.Event()

    def write():
        files.write_bytes(path, json.dumps({**me, "renewed": time.time()}).encode())

    def is_mine() -> bool:
        return (_read(path) or me).get("token") == me["token"]

    def renew():
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # a bucket's bad moment
                if not is_mine():
                    return taken.set()
                write()

    def check():
        if taken.is_set():
            raise Lost(f"another process has come into {path.parent} since: {_words(_read(path))}")

    write()
    time.sleep(min(LOOK_SECONDS, 1.0))  # of two that come at once, the last to write has it
    if not is_mine():
        raise _refusal(path, flag)
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            if not taken.is_set() and is_mine():
                files.remove(path)


def _read(path: epath.Path) -> dict[str, Any] | None:
    """What a lock's file says; {} if that is not to be understood, None if there is no file."""
    try:
        found = json.loads(files.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_fresh(found: dict[str, Any] | None) -> bool:
    """Whether a lease may hold, by its own clock."""
    renewed = (found or {}).get("renewed")
    return isinstance(renewed, float) and time.time() - renewed < STALE_SECONDS


def _words(found: dict[str, Any] | None) -> str:
    found = found or {}
    who = f"process {found.get('pid', '?')} on {found.get('host', 'an unknown host')}"
    return f"{who}, there since {found.get('since', 'an unknown time')}"


def _refusal(path: epath.Path, flag: str) -> UserError:
    return UserError(
        f"{flag}={path.parent} is in use by {_words(_read(path))}: wait for its end, or stop it"
    )
