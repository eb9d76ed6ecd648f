"""Saves the checkpoints of a run, and again what could not be saved."""

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
    """Saves in the background. After a failure the run goes on, and is saved at a later step.

    Of several processes, one that fails cannot have the others save once more: they wait for it within
    Orbax. There the run ends, to be started again from the checkpoint before; what tensorstore and
    gcsfs try again on their own is the same everywhere.
    """

    def __init__(self, manager: ocp.CheckpointManager):
        self._manager, self._failures, self._again = manager, 0, math.inf

    def due(self) -> bool:
        """Whether to save now because the last save failed, some time ago.

        Raises:
          CheckpointFailed: if time will not mend it, or several saves in a row have failed.
        """
        try:
            checkpoints.check_background_save(self._manager)
        except checkpoints.CheckpointFailed as error:
            self._note(error)
        return time.monotonic() >= self._again

    def save(self, *what: Any, wait: bool) -> None:
        """Saves as `checkpoints.save` does; with `wait` it is there when this returns.

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
            self._failures = self._failures if failed else 0  # the one before has ended well
        except checkpoints.CheckpointFailed as error:
            self._note(error)

    def _note(self, error: checkpoints.CheckpointFailed) -> None:
        if is_lasting(error) or jax.process_count() > 1 or self._failures == len(PAUSES):
            raise error
        pause = PAUSES[self._failures]
        self._failures, self._again = self._failures + 1, time.monotonic() + pause
        log.warning("%s; the run goes on, and is saved again in %d s", sentence(error), pause)
