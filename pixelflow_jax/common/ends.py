"""How a process ends: at once, whatever its threads are doing, and after the processes that need it."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

LEAVE_SECONDS = 10.0  # to wait for LAST
INTERRUPT_SECONDS = 1.0  # for the main thread to end by itself after a signal
# Signals that end the process although its main thread does not return to Python: exit code, message
SIGNALS: dict[int, tuple[int, str]] = {signal.SIGINT: (130, "interrupted")}
LAST: list[Callable[[], bool]] = []  # what must be true before this process ends


def leave(code: int) -> None:
    """End this process at once, but wait up to LEAVE_SECONDS for LAST.

    Python would join all threads, some of which wait for minutes after a failed save, and JAX would wait
    for the other processes.
    """
    end = time.monotonic() + LEAVE_SECONDS
    while not all(done() for done in LAST) and time.monotonic() < end:
        time.sleep(0.05)
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full or missing
            stream.flush()
    os._exit(code)


def end_at_signals() -> None:
    """Let SIGNALS end this process even while its main thread is in C code.

    Python runs signal handlers in the main thread only, which an XLA compilation holds for minutes.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)

    def wait():
        while received := receiver.recv(1):
            if received[0] in SIGNALS:
                time.sleep(INTERRUPT_SECONDS)
                code, message = SIGNALS.get(received[0], (0, ""))
                if code:  # still wanted
                    print(message, file=sys.stderr)
                    leave(code)

    threading.Thread(target=wait, name="signals", daemon=True).start()
