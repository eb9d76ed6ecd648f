"""Saves a run's checkpoints, and retries saves that failed."""

import logging
import math
import time
from typing import Any

import jax
import orbax.checkpoint as ocp

from pixelflow_jax.common.errors import sentence
from pixelflow_jax.training import checkpoints
from pixelflow_jax.training.writes import PAUSES, is_lasting, retried

log = logging.getLogger(__name__)


class Saver:
    """Saves in the background. After a failure the run continues and saves again at a later step.

    With several processes the first failure ends the run, to be restarted from the last checkpoint: the
    others wait inside Orbax for the process that failed, which cannot make them save again. The retries
    of tensorstore and gcsfs themselves work everywhere.
    """

    def __init__(self, manager: ocp.CheckpointManager):
        self._manager, self._failures, self._again = manager, 0, math.inf

    def due(self) -> bool:
        """Return whether a failed save is due to be repeated.

        Raises:
          CheckpointFailed: if retrying cannot help, or several saves in a row have failed.
        """
        try:
            checkpoints.check_background_save(self._manager)
        except checkpoints.CheckpointFailed as error:
            self._note(error)
        return time.monotonic() >= self._again

    def save(self, *what: Any, wait: bool) -> None:
        """Save as `checkpoints.save`; with `wait`, return only once the checkpoint is written.

        Raises:
          CheckpointFailed: as `due`.
        """

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
