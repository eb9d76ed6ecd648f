"""Writes that outlast a failure: again after a growing pause, and of growing files in the background."""

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from etils import epath

from pixelflow_jax.common import files
from pixelflow_jax.common.errors import sentence

log = logging.getLogger(__name__)
PAUSES = (2, 4, 8, 16, 32)  # seconds before another try; the one after the last is the last
LASTING = re.compile(
    "no space left|file too large|quota|read-only|permission denied|not permitted|forbidden|inodes", re.I
)
RATE = 1e6  # bytes a second that the rewriting of a growing object may cost on average
Result = TypeVar("Result")


def is_lasting(error: BaseException) -> bool:
    """Whether time will not mend it: a full disk, no rights."""
    return LASTING.search(str(error)) is not None


def retried(what: str, write: Callable[[], Result], kinds: type[Exception] = OSError) -> Result:
    """What `write` gives; if it fails, it is called again, after a growing pause, and a line says so.

    Raises:
      kinds: what `write` raised, if that lasts.
    """
    for pause in PAUSES:
        try:
            return write()
        except kinds as error:
            if is_lasting(error):
                raise
            log.warning("%s failed, again in %d s: %s", what, pause, sentence(error))
        time.sleep(pause)
    return write()


class Journal:
    """A file that grows, written in the background: nobody waits for the disk or the bucket.

    A bucket's object cannot grow, so it is written anew, as a whole, in one request; of what comes
    faster than that, several parts go together. A write that fails is tried again, for ever.

    Args:
      path: of the file.
      kept: what it holds already.
    """

    def __init__(self, path: epath.PathLike, kept: bytes = b""):
        self._path, self._data = path, bytearray(kept)
        self._handed = self._written = len(kept)  # bytes to be written, and that are
        self._failures, self._lasting, self._hurry, self._closed = 0, False, False, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Adds to what the next `flush` hands over."""
        self._data += data

    def flush(self) -> None:
        """Has what was added written, soon; does not wait."""
        with self._changed:
            self._handed = len(self._data)
            self._changed.notify_all()

    def settle(self) -> bool:
        """Waits until all is written, or a few tries have failed, or one for good.

        Returns whether all is written.
        """
        self.flush()
        with self._changed:
            self._hurry, begin = True, self._failures
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: (
                    self._written == self._handed
                    or self._lasting
                    or self._failures > max(begin, len(PAUSES) // 2)
                )
            )
            self._hurry = False
            return self._written == self._handed

    def close(self) -> None:
        """Ends the writing. Raises OSError if something could not be written."""
        whole = self.settle()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not whole:
            missing = bytes(self._data[self._written :])
            raise OSError(f"{self._path} lacks its last {len(missing)} bytes, which cannot be written")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._written < self._handed)
                if self._closed:
                    return
                data = bytes(self._data[: self._handed])
            try:
                files.grow(self._path, data, self._written)
            except OSError as error:
                pause = PAUSES[min(self._failures, len(PAUSES) - 1)]
                log.warning("%s failed, again in %d s: %s", self._path, pause, sentence(error))
                self._note(self._written, self._failures + 1, is_lasting(error))
                self._pause(pause, lambda: False)
            else:
                self._note(len(data), 0)
                if files.is_remote(self._path):
                    self._pause(max(1.0, len(data) / RATE), lambda: self._hurry)

    def _note(self, written: int, failures: int, lasting: bool = False) -> None:
        with self._changed:
            self._written, self._failures, self._lasting = written, failures, lasting
            self._changed.notify_all()

    def _pause(self, seconds: float, over: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or over(), seconds)
