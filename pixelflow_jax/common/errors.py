"""The one exception that means: the user can mend this."""

import contextlib
import importlib
import types
from collections.abc import Iterator

LONGEST = 3000


class UserError(ValueError):
    """Bad input from a person: a flag, a file, a config value.

    The message says what was wrong, where it came from and what would be right. Commands print it
    as one line without a traceback and exit with code 2; anything else that escapes is a bug. A longer
    one than LONGEST characters, such as one that quotes a value, loses its middle.
    """

    def __init__(self, message: str = ""):
        super().__init__(_cut(message, LONGEST))


def sentence(error: BaseException, limit: int = 600) -> str:
    """What an error says, on one line that a terminal can show; a long text loses its middle."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return _cut(text, limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


@contextlib.contextmanager
def blame(what: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """Turns errors of these kinds into a UserError: "{what}: {what the error says}"."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what}: {sentence(error)}") from None


def optional(module: str, extra: str, what: str) -> types.ModuleType:
    """A module of an extra. Raises UserError, with the way to install it, if it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs the extra `{extra}` (pip install 'pixelflow_jax[{extra}]'): {sentence(error)}"
        ) from None
    except Exception as error:  # a library of the system's, a setting in the environment
        raise UserError(
            f"{what} needs {module}, which is there but cannot start: {sentence(error)}"
        ) from None


class Lost(Exception):
    """The run cannot go on without a process that is missing, gone or hangs; nothing is broken.

    Commands print it as one line and exit with EXIT_LOST.
    """


EXIT_PREEMPTED = 75  # a run stopped by a preemption signal after saving: start it again
EXIT_LOST = 76  # see Lost: start it again when the machines are well
