"""Notice that the machine is about to be preempted."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

from pixelflow_jax.common import ends

EXIT_PREEMPTED = 75  # stopped by a preemption signal after saving: start the same command again
NOTHING = "Stopped before the first step was done: start it again"


class Preempted(BaseException):
    """The run has stopped because of a signal, with all progress saved.

    Like KeyboardInterrupt, this is not an Exception, so that error handlers do not catch it.
    """


class PreemptionWatch:
    """Reports after each step whether a SIGTERM has arrived; used as a context manager.

    A single process handles the signal itself; before the first step, when there is nothing to save, it
    raises Preempted at once. With several processes, JAX's preemption service handles a signal to any of
    them and agrees on the step after which all stop, so that they save the same step. Orbax uses the
    same service.
    """

    def __init__(self):
        self._seen = self._begun = False
        self._several = jax.process_count() > 1
        self._before = None

    def __enter__(self):
        if not self._several and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            ends.SIGNALS[signal.SIGTERM] = EXIT_PREEMPTED, NOTHING
        return self

    def __exit__(self, *_):
        ends.SIGNALS.pop(signal.SIGTERM, None)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_):
        self._seen = True
        if not self._begun:
            raise Preempted(NOTHING)

    def requested(self, step: int) -> bool:
        """Return whether to save after update number `step` and stop; equal on every process."""
        self._begun = True
        ends.SIGNALS.pop(signal.SIGTERM, None)
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._seen
