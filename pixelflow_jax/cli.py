"""What the commands share: a parser that teaches, and errors for people."""

import argparse
import logging
import sys
import traceback
from collections.abc import Callable

from pixelflow_jax import hosts
from pixelflow_jax.errors import EXIT_LOST, EXIT_PREEMPTED, Lost, UserError


class Parser(argparse.ArgumentParser):
    """Takes a bad flag as all other bad input: one sentence, no page of usage."""

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
    sys.unraisablehook = _unraisable
    try:
        main()
        return
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Lost as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_LOST
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except SystemExit as request:  # a command's own report
        if not isinstance(request.code, int) or request.code in (0, EXIT_PREEMPTED):
            raise
        code = request.code
    except Exception:
        traceback.print_exc()
        code = 1
    hosts.leave(code)
    sys.exit(code)


def _unraisable(what) -> None:
    """Python's own hook for exceptions that nobody can catch, but for the noise of a failed save.

    Tensorstore's threads go on to call a loop that Orbax has closed; the save is reported in a sentence.
    """
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes files."""
    import jax

    return jax.process_index() == 0
