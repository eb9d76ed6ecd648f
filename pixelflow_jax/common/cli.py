"""What the commands share: a parser that teaches, and errors for people."""

import argparse
import contextlib
import ctypes
import errno
import importlib.util
import inspect
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable

import jax

from pixelflow_jax.common import ends, files, hardware, numerics
from pixelflow_jax.common.errors import Explained, UserError, sentence

# Flags of text that may look like anything
WORDS = ("prompt", "negative_prompt", "labels", "negative_labels")
LITTLE = 1 << 16  # bytes that are free on a full disk
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


class Parser(argparse.ArgumentParser):
    """Takes a bad flag as all other bad input: one sentence, no page of usage."""

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        for action in self._actions:
            value, flag = getattr(found, action.dest, None), (action.option_strings or [action.dest])[0]
            if action.nargs is None and value == [] != action.default:  # argparse's way with --flag=--
                self.error(f"{flag}: expected a value")
            each = value if isinstance(value, (list, tuple)) else [value]
            is_path = action.dest not in WORDS
            each = [files.clean_text(flag, x, is_path) if isinstance(x, str) else x for x in each]
            if value is not None:
                setattr(
                    found,
                    action.dest,
                    type(value)(each) if isinstance(value, (list, tuple)) else each[0],
                )
        return found

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')} (--help tells all flags)")


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help shows the module's docstring as it is written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return Parser(description=doc, formatter_class=formatter, allow_abbrev=False)


def run(main: Callable[[], None]) -> None:
    """Runs a command: bad input is one line on stderr and exit code 2, without a traceback."""
    for name in ("absl", "asyncio"):  # Orbax logs tracebacks there of what we report in a sentence
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # A failed save leaves its other writes unawaited, and Python would say so after our sentence.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {sentence(message)}\n"
    # Who ends at once leaves the semaphores of its workers to Python's tracker, which says so.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    sys.unraisablehook = _unraisable
    mend_streams()
    keep_freed_memory()
    ends.end_at_signals()
    try:
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # see __init__.py
        for name, value in numerics.switches().items():
            print(f"warning: {name.upper()}={value} may change the last bits", file=sys.stderr)
        with numerics.pinned():
            main()
        sys.stdout.flush()  # a full disk shows here, not at Python's end
        return
    except Explained as error:
        print(f"error: {sentence(error, error.printed)}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}{_which_is_full(error)}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one
        print("interrupted", file=sys.stderr)
        code = 130
    except SystemExit as request:  # a command's own report
        if request.code in (None, 0):
            raise
        if not isinstance(request.code, int):
            print(request.code, file=sys.stderr)
        code = request.code if isinstance(request.code, int) else 1
    except Exception as error:
        why = usual_cause(error)
        if why:
            print(f"error: {why}", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 2 if why else 1
    ends.leave(code)


def mend_streams() -> None:
    """Lets a command run whose standard streams were closed, or cannot show every letter."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            mode = os.O_RDONLY if number == 0 else os.O_WRONLY
            null = os.open(os.devnull, mode)
            try:
                os.fstat(number)  # taken by a file meanwhile
            except OSError:
                os.dup2(null, number)
            setattr(sys, name, open(null, "w" if number else "r"))
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _which_is_full(error: OSError) -> str:
    """Where there is no space left, as far as the error does not say so itself: "" or ": the places"."""
    if error.errno != errno.ENOSPC or error.filename is not None:
        return ""
    full = []
    for place in ("/dev/shm", tempfile.gettempdir()):  # the first is where processes share memory
        with contextlib.suppress(OSError):
            full += [place] if shutil.disk_usage(place).free < LITTLE else []
    return f": {' and '.join(full)}" if full else ""


def usual_cause(error: Exception) -> str:
    """What is behind an error that has nothing to do with where it came up; "" if nobody knows."""
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return "gs:// paths need gcsfs: pip install 'pixelflow_jax[gcs]'"
    try:
        if jax.config.jax_platforms:
            hardware.local_devices()
    except UserError as cause:
        return sentence(cause)
    return ""


def keep_freed_memory() -> None:
    """On CPU, keeps memory that XLA frees after a step for the next one.

    glibc hands large arrays back to the kernel at once, and gets them again as zeroed pages: a quarter
    of the processor time of a small training. Hosts of accelerators are left alone: their loaders'
    threads want heaps of their own.
    """
    plugins = ("libtpu", "jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin")
    if any(importlib.util.find_spec(name) for name in plugins):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, value in ((M_ARENA_MAX, 1), (M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0)):
        mallopt(option, value)


def _unraisable(what) -> None:
    """Python's own hook for exceptions that nobody can catch, but for noise of a failed save or read.

    Tensorstore's threads go on to call a loop that Orbax has closed, and coroutines of other arrays end
    with errors of their own; the first is reported in a sentence.
    """
    if str(what.exc_value) != "Event loop is closed" and not inspect.iscoroutine(what.object):
        sys.__unraisablehook__(what)
