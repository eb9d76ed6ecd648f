"""Notices that the machine is about to be taken away."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

from pixelflow_jax.common import ends
from pixelflow_jax.common.errors import EXIT_PREEMPTED

NOTHING = "Stopped before a first step was done: start it again"


class Preempted(BaseException):
    """The run has stopped because of a signal, all that it has done saved.

    No Exception, as KeyboardInterrupt is none: who handles errors must not take it for one.
    """


class PreemptionWatch:
    """Tells, after each step, whether a SIGTERM has come; used as a context manager.

    In one process it handles the signal itself: before the first step, when there is nothing to save, it
    raises Preempted at once. With several, JAX's preemption service does (a signal to any one of them
    counts) and agrees on the step after which all of them stop, so that they save the same one; that is
    the signal that Orbax goes by too.
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
        """Whether to save after update number `step` and stop; the same answer on every process."""
        self._begun = True
        ends.SIGNALS.pop(signal.SIGTERM, None)
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._seen
