"""What the commands share: a flag parser, and errors reported as one line."""

import argparse
import contextlib
import errno
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

from pixelflow_jax.common import Explained, UserError, cache, ends, files, hardware, numerics, sentence

# Flags that take free text
WORDS = ("prompt", "negative_prompt", "labels", "negative_labels")
LITTLE = 1 << 16  # a disk with fewer free bytes is full


class Parser(argparse.ArgumentParser):
    """Parse flags; report a bad one as a UserError, without a page of usage."""

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        for action in self._actions:
            value, flag = getattr(found, action.dest, None), (action.option_strings or [action.dest])[0]
            if action.nargs is None and value == [] != action.default:  # argparse, of --flag=--
                self.error(f"{flag}: expected a value")
            each = value if isinstance(value, (list, tuple)) else [value]
            is_path = action.dest not in WORDS
            each = [files.clean_text(flag, x, is_path) if isinstance(x, str) else x for x in each]
            if value is not None:
                cleaned = type(value)(each) if isinstance(value, (list, tuple)) else each[0]
                setattr(found, action.dest, cleaned)
        return found

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')} (--help lists all flags)")


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose help shows a module's docstring verbatim."""
    formatter = argparse.RawDescriptionHelpFormatter
    result = Parser(description=doc, formatter_class=formatter, allow_abbrev=False)
    said = "compile anew, and keep no compiled programs (docs/troubleshooting.md)"
    result.add_argument(f"--{cache.FLAG}", action="store_true", help=said)
    return result


def run(main: Callable[[], None]) -> None:
    """Run a command: bad input gives one line on stderr and exit code 2, without a traceback."""
    for name in ("absl", "asyncio"):  # Orbax logs tracebacks of errors that we report ourselves
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # A failed save leaves other writes unawaited; Python would warn of them after our message.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {sentence(message)}\n"
    # `ends.leave` leaves the semaphores of workers to Python's resource tracker, which would warn.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    sys.unraisablehook = _unraisable
    mend_streams()
    ends.end_at_signals()
    try:
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # see __init__.py
        for name, value in numerics.switches().items():
            print(f"warning: {name.upper()}={value} may change the last bits", file=sys.stderr)
        if f"--{cache.FLAG}" in sys.argv:
            jax.config.update("jax_enable_compilation_cache", False)
        else:
            cache.keep_programs()
        with numerics.pinned():
            main()
        sys.stdout.flush()  # here, a full disk still gives our error
        return
    except Explained as error:
        print(f"error: {sentence(error, error.printed)}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:  # such as a full disk or a read-only folder
        print(f"error: {error}{_which_is_full(error)}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one
        print("interrupted", file=sys.stderr)
        code = 130
    except SystemExit as end:  # a command has reported by itself
        if end.code in (None, 0):
            raise
        if not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:
        why = usual_cause(error)
        if why:
            print(f"error: {why}", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 2 if why else 1
    ends.leave(code)


def mend_streams() -> None:
    """Replace standard streams that are closed, and escape characters that they cannot show."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            mode = os.O_RDONLY if number == 0 else os.O_WRONLY
            null = os.open(os.devnull, mode)
            try:
                os.fstat(number)  # free; otherwise a file has taken the number
            except OSError:
                os.dup2(null, number)
            setattr(sys, name, open(null, "w" if number else "r"))
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _which_is_full(error: OSError) -> str:
    """Return ": " and the places without space left, if the error does not name one; else ""."""
    if error.errno != errno.ENOSPC or error.filename is not None:
        return ""
    full = []
    for place in ("/dev/shm", tempfile.gettempdir()):  # the first is shared memory
        with contextlib.suppress(OSError):
            full += [place] if shutil.disk_usage(place).free < LITTLE else []
    return f": {' and '.join(full)}" if full else ""


def usual_cause(error: Exception) -> str:
    """Return the cause of an error that does not show where it was raised, or "" if it is unknown."""
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return "gs:// paths need gcsfs: pip install 'pixelflow_jax[gcs]'"
    try:
        if jax.config.jax_platforms:
            hardware.local_devices()
    except UserError as cause:
        return sentence(cause)
    return ""


def _unraisable(what) -> None:
    """Report uncaught exceptions as Python does, except those that follow a failed save or read.

    Tensorstore's threads still call an event loop that Orbax has closed, and the coroutines of other
    arrays fail too; the first error is reported by `run`.
    """
    if str(what.exc_value) != "Event loop is closed" and not inspect.iscoroutine(what.object):
        sys.__unraisablehook__(what)
