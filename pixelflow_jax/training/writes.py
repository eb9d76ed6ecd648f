"""Writes that survive failures: retries, growing files and checkpoints in the background."""

import math
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from pixelflow_jax.common import files, log, sentence
from pixelflow_jax.training import checkpoints

PAUSES = (2, 4, 8, 16, 32)  # seconds before each retry
LASTING = re.compile(
    "no space left|file too large|quota|read-only|permission denied|not permitted|forbidden|inodes", re.I
)
RATE = 1e6  # mean bytes per second that rewriting a growing object may cost


def is_lasting(error: BaseException) -> bool:
    """Return whether retrying cannot help: a full disk, missing rights."""
    return LASTING.search(str(error)) is not None


def retried(what: str, write: Callable[[], Any], kinds: type[Exception] = OSError) -> Any:
    """Return `write()`; on an error of type `kinds`, warn, pause and retry.

    Raises the last error once the retries are used up or cannot help.
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
    """A growing file that a background thread writes, so that the caller never waits for storage.

    A bucket's object cannot grow: each write replaces it in one request, and what arrives meanwhile goes
    into the next one. A failed write is retried until the journal is closed. `kept` is what the file
    already holds.
    """

    def __init__(self, path: epath.PathLike, kept: bytes = b""):
        self._path, self._data = path, bytearray(kept)
        self._handed = self._written = len(kept)  # bytes: to be written, already written
        self._failures, self._lasting, self._hurry, self._closed = 0, False, False, False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def write(self, data: bytes) -> None:
        """Add to what the next `flush` hands over."""
        self._data += data

    def flush(self) -> None:
        """Hand over what was added; return at once."""
        self._set(_handed=len(self._data))

    def settle(self) -> bool:
        """Wait until everything is written, a few tries have failed or one cannot succeed.

        Returns whether everything is written.
        """
        most = max(self._failures, len(PAUSES) // 2)
        self._set(_handed=len(self._data), _hurry=True)
        with self._changed:
            self._changed.wait_for(
                lambda: self._written == self._handed or self._lasting or self._failures > most
            )
            self._hurry = False
            return self._written == self._handed

    def close(self) -> None:
        """End the writing. Raises OSError if something could not be written."""
        whole = self.settle()
        self._set(_closed=True)
        if not whole:
            missing = len(self._data) - self._written
            raise OSError(f"{self._path} lacks its last {missing} bytes, which cannot be written")

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
                self._set(_failures=self._failures + 1, _lasting=is_lasting(error))
                self._pause(pause, lambda: False)
            else:
                self._set(_written=len(data), _failures=0, _lasting=False)
                if files.is_remote(self._path):
                    self._pause(max(1.0, len(data) / RATE), lambda: self._hurry)

    def _set(self, **attributes: int) -> None:
        with self._changed:
            vars(self).update(attributes)
            self._changed.notify_all()

    def _pause(self, seconds: float, over: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or over(), seconds)


class Saver:
    """Saves a run's checkpoints in the background. After a failure, the run saves again at a later step.

    With several processes the first failure ends the run, to be restarted from the last checkpoint: the
    others wait inside Orbax for the process that failed, which cannot make them save again. The retries
    of tensorstore and gcsfs themselves work everywhere.
    """

    def __init__(self, manager: ocp.CheckpointManager):
        self._manager, self._failures, self._again = manager, 0, math.inf

    def due(self) -> bool:
        """Return whether a failed save is due to be repeated.

        Raises CheckpointFailed if retrying cannot help, or several saves in a row have failed.
        """
        try:
            checkpoints.check_background_save(self._manager)
        except checkpoints.CheckpointFailed as error:
            self._note(error)
        return time.monotonic() >= self._again

    def save(self, *what: Any, wait: bool) -> None:
        """Save as `checkpoints.save`, once it is written if `wait`. Raises CheckpointFailed as `due`."""

        def once() -> None:
            checkpoints.save(self._manager, *what)
            if wait:
                checkpoints.check_background_save(self._manager, wait=True)

        if wait and jax.process_count() == 1:
            return retried("saving", once, checkpoints.CheckpointFailed)
        failed = self._again < math.inf
        self._again = math.inf
        try:
            once()
            self._failures = self._failures if failed else 0  # the save before succeeded
        except checkpoints.CheckpointFailed as error:
            self._note(error)

    def _note(self, error: checkpoints.CheckpointFailed) -> None:
        if is_lasting(error) or jax.process_count() > 1 or self._failures == len(PAUSES):
            raise error
        pause = PAUSES[self._failures]
        self._failures, self._again = self._failures + 1, time.monotonic() + pause
        log.warning("%s; the run continues and saves again in %d s", sentence(error), pause)
