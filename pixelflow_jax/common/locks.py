"""One process at a time in a folder: a kernel lock on disks, a lease in buckets.

The kernel releases a lock when its process ends for any reason; network disks (NFS) do so some time
after the host is gone. Where locks are not available, as in buckets, the holder renews a lease file. A
later process waits until the lease has not been renewed for long enough, and is refused if it is
renewed.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from pixelflow_jax.common import Lost, UserError, files, log

RENEW_SECONDS = 60.0  # between renewals of a lease
STALE_SECONDS = 150.0  # after which a lease that was not renewed has expired
LOOK_SECONDS = 5.0  # between checks of a lease
TRIES = 10  # attempts at a lock, because the doctor holds one briefly
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # from some mounts


@contextlib.contextmanager
def held(folder: epath.PathLike, flag: str) -> Iterator[Callable[[], None]]:
    """Keep other processes out of a folder while the context is active; create the folder if needed.

    Args:
      folder: local or gs://.
      flag: the flag that names the folder, for error messages.

    Yields:
      A function that raises Lost if another process has taken the folder: a process loses a lease that
      it could not renew for minutes.

    Raises:
      UserError: if another process uses the folder; the message names the process.
    """
    path = epath.Path(folder) / files.LOCK
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }
    if not files.is_remote(folder):
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
    """Return a description of the process that uses a folder; None if there is none."""
    path = epath.Path(folder) / files.LOCK
    found = _read(path)
    if found is None or files.is_remote(folder):
        return _words(found) if _is_fresh(found) else None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _words(found)
    except OSError:  # locks are not available
        return _words(found) if _is_fresh(found) else None
    finally:
        os.close(descriptor)
    return None


def _lock(path: epath.Path, flag: str) -> int | None:
    """Return the locked file's descriptor, None without lock support. Raises UserError if taken."""
    for _ in range(TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # not inherited by child processes
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # the previous holder has just removed the file
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
    """Like `held`, with a lease file that is renewed."""
    first, end = _read(path), time.monotonic() + STALE_SECONDS
    found = first
    while _is_fresh(found) and time.monotonic() < end:
        if found != first:
            raise _refusal(path, flag)
        if found is first:
            log.warning("%s: waiting for the lease of %s to expire", path, _words(found))
        time.sleep(LOOK_SECONDS)
        found = _read(path)
    taken, ended = threading.Event(), threading.Event()

    def write():
        files.write_bytes(path, json.dumps({**me, "renewed": time.time()}).encode())

    def is_mine() -> bool:
        return (_read(path) or me).get("token") == me["token"]

    def renew():
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # a temporary error of a bucket
                if not is_mine():
                    return taken.set()
                write()

    def check():
        if taken.is_set():
            raise Lost(f"another process has taken {path.parent}: {_words(_read(path))}")

    write()
    time.sleep(min(LOOK_SECONDS, 1.0))  # of two simultaneous processes, the last to write has it
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
    """Return the contents of a lock file; {} if they are not valid, None if there is no file."""
    try:
        found = json.loads(files.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_fresh(found: dict[str, Any] | None) -> bool:
    """Return whether a lease may be valid, according to its own clock."""
    renewed = (found or {}).get("renewed")
    return isinstance(renewed, float) and time.time() - renewed < STALE_SECONDS


def _words(found: dict[str, Any] | None) -> str:
    found = found or {}
    who = f"process {found.get('pid', '?')} on {found.get('host', 'an unknown host')}"
    return f"{who}, there since {found.get('since', 'an unknown time')}"


def _refusal(path: epath.Path, flag: str) -> UserError:
    return UserError(
        f"{flag}={path.parent} is in use by {_words(_read(path))}: wait until it ends, or stop it"
    )
