"""Notice that a process of the run is gone or that a step hangs, and end the run with a reason.

Without the watchdog, the other processes wait in a collective until JAX aborts them with a stack trace,
or forever. A thread in each process reports its progress to process 0 over the connections of the roll
call (rollcall.py), and process 0 decides.
"""

import contextlib
import math
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from pixelflow_jax.common import Explained, Lost
from pixelflow_jax.distributed import hosts
from pixelflow_jax.distributed.hosts import START_SILENCE
from pixelflow_jax.distributed.preemption import Preempted
from pixelflow_jax.distributed.rollcall import Cluster

BEAT = 1.0  # seconds between messages
GRACE = 3.0  # seconds for a process to end with its own error, once the run is over
WAITING = "waiting for the others"  # at this place no process is late
STARTING = "starting"  # prefix of places without a time limit
OWN = (Explained, Preempted)  # errors that explain themselves
LOST = "Checkpoints are kept: start the same command again on all hosts to resume from the newest"


@contextlib.contextmanager
def joined(
    timeouts: ConfigDict, patient: bool = False, **settings: Any
) -> Iterator[Callable[[str], None]]:
    """Hold the roll call, connect JAX's processes, and watch them until the context ends.

    Args:
      timeouts: a config's `hosts`.
      patient: whether a single process has no time limit.
      settings: what all processes must agree on, see `rollcall.make_record`.

    Yields:
      `Watchdog.at`.
    """
    cluster = hosts.gather(timeouts.start_timeout, **settings)
    step_timeout = timeouts.step_timeout if cluster or not patient else math.inf
    with Watchdog(cluster, step_timeout, timeouts.heartbeat_timeout) as watchdog:
        if cluster:
            hosts.connect_jax(cluster, timeouts.start_timeout, timeouts.heartbeat_timeout)
            if jax.process_index() == 0:
                print(hosts.host_table(cluster), file=sys.stderr)
        yield watchdog.at


class Watchdog:
    """Watches the processes of a run while its context is active.

    Args:
      cluster: the processes; None if this process is alone.
      step_timeout: seconds without progress in any process after which the run counts as hanging.
      heartbeat_timeout: seconds of silence after which a process counts as gone.
    """

    def __init__(self, cluster: Cluster | None, step_timeout: float, heartbeat_timeout: float):
        self._cluster = cluster
        self._index = cluster.place.index if cluster else 0
        self._step_timeout, self._heartbeat_timeout = step_timeout, heartbeat_timeout
        self._links, now = dict(cluster.links) if cluster else {}, time.monotonic()
        self._heard = dict.fromkeys(self._links, now)
        begin = (0, STARTING, now)  # number of earlier places, name, start time
        self._places = dict.fromkeys([self._index, *self._links], begin)
        self._verdict: str | None = None
        self._reminded = 0.0  # start time of the slow place that was reported last
        self._judged, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        """Say goodbye. Raise Lost in place of an error that another process's end has caused."""
        own = error is None or isinstance(error, OWN)
        if not own and self._links:
            self._judged.wait(2 * BEAT)  # a collective fails before the reason arrives
        self._done.set()
        self._thread.join(2 * BEAT)
        fine = error is None or isinstance(error, Preempted)
        self._tell({"bye": None if fine else f"{type(error).__name__}: {error}".splitlines()[0]})
        if self._verdict and not own and isinstance(error, Exception):
            raise Lost(self._verdict) from error

    def _tell(self, message: dict) -> None:
        for link in list(self._links.values()):
            with contextlib.suppress(OSError):  # noticed when receiving
                link.send(message)

    def at(self, what: str) -> None:
        """Record that this process is at `what`, such as "step 41" or f"{STARTING}: a download"."""
        self._places[self._index] = (self._places[self._index][0] + 1, what, time.monotonic())

    def _watch(self) -> None:
        while not self._done.is_set() and self._verdict is None:
            begin = time.monotonic()
            verdict = self._exchange() or self._hanging()
            if verdict and not self._done.is_set():
                self._end(verdict)
            self._done.wait(max(0.0, BEAT - (time.monotonic() - begin)))

    def _end(self, verdict: str) -> None:
        """Send the verdict to all; end this process if its main thread does not end by itself."""
        self._verdict = verdict
        self._judged.set()
        if self._index == 0:
            self._tell({"end": verdict})
        if not self._done.wait(GRACE):
            print(f"\nerror: {verdict}", file=sys.stderr, flush=True)
            os._exit(Lost.exit_code)  # the main thread is in a collective that will not return

    def _exchange(self) -> str | None:
        """Exchange places with the others for one beat; return what is wrong, if anything."""
        self._tell({"at": self._places[self._index][:2]})
        end = time.monotonic() + BEAT
        while self._links and (left := end - time.monotonic()) > 0 and not self._done.is_set():
            sockets = {link.socket: index for index, link in self._links.items()}
            for ready in select.select(list(sockets), [], [], left)[0]:
                verdict = self._hear(sockets[ready])
                if verdict:
                    return verdict
        now = time.monotonic()
        silent = [i for i, at in self._heard.items() if now - at > self._patience(i)]
        if silent:
            return (
                f"nothing was heard of {self._names(silent)} for {self._patience(silent[0]):g} s. Check "
                f"whether the machine is up. {LOST}"
            )
        return None

    def _patience(self, index: int) -> float:
        """Return the seconds that a process may be silent: more while JAX starts, which can block it."""
        started = not self._places[index][1].startswith(STARTING)
        return self._heartbeat_timeout if started else max(self._heartbeat_timeout, START_SILENCE)

    def _hear(self, index: int) -> str | None:
        """Process the messages of one process; return what is wrong, if anything."""
        link = self._links[index]
        try:
            while (message := link.receive(0)) is not None:
                self._heard[index] = time.monotonic()
                if "end" in message:
                    return message["end"]
                if "bye" in message:
                    del self._links[index], self._heard[index], self._places[index]
                    if message["bye"]:
                        return f"{self._cluster.name(index)} stopped: {message['bye']}"
                    return None
                if message["at"][0] != self._places[index][0]:
                    self._places[index] = (*message["at"], time.monotonic())
        except OSError:
            return f"{self._cluster.name(index)} is gone: killed, crashed or disconnected. {LOST}"
        return None

    def _hanging(self) -> str | None:
        """Return which process is late, if none has made progress for too long."""
        places = dict(self._places)
        newest = max(since for _, _, since in places.values())
        if self._index or time.monotonic() - newest < self._step_timeout:
            return None
        starting = [i for i, place in places.items() if place[1].startswith(STARTING)]
        if starting:  # no limit for reading and compiling; losses are noticed otherwise
            if self._reminded != newest:
                self._reminded = newest
                where = places[starting[0]][1]
                print(f"\nnote: {where}, for {self._step_timeout:g} s", file=sys.stderr, flush=True)
            return None
        busy = {i: place for i, place in places.items() if place[1] != WAITING}
        first = min(busy.values(), default=(0,))[0]
        late = sorted(i for i, place in busy.items() if place[0] == first) or sorted(places)
        where = f"{places[late[0]][1]!r} for {self._step_timeout:g} s"
        if len(late) == len(places):
            who = "every process" if self._cluster else "this process"
            return f"{who} has been at {where} (--config.hosts.step_timeout). {LOST}"
        ahead = max(place for i, place in places.items() if i not in late)[1]
        return (
            f"{self._names(late)} is late: at {where}, while others wait at {ahead!r} "
            f"(--config.hosts.step_timeout). {LOST}"
        )

    def _names(self, indices: list[int]) -> str:
        return " and ".join(self._cluster.name(index) for index in indices)
