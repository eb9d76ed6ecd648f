"""Errors that a person can act on, and how a command reports them."""

import contextlib
import importlib
import types
from collections.abc import Iterator, Sequence

LONGEST = 3000  # characters of a message


class Explained(Exception):
    """An error whose message tells a person why the command ended.

    Commands print it as one line, without a traceback, and exit with `exit_code`. Any other exception
    that escapes is a bug.
    """

    exit_code = 1
    printed = LONGEST  # characters that a command prints


class UserError(Explained, ValueError):
    """Bad input from a person: a flag, a file, a config value.

    The message says what is wrong, where it came from and what would be right. A message longer than
    LONGEST characters, such as one that quotes a value, loses its middle.
    """

    exit_code = 2
    printed = 600

    def __init__(self, message: str = ""):
        super().__init__(_cut(message, LONGEST))


class Lost(Explained):
    """The run cannot continue without a process that is missing, gone or hanging; nothing is broken."""

    exit_code = 76  # start the same command again when the machines are well


def sentence(error: BaseException, limit: int = UserError.printed) -> str:
    """Return an error's message as one printable line; a long message loses its middle."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return _cut(text, limit)


def listed(names: Sequence[str], limit: int, separator: str = ", ") -> str:
    """Join the first `limit` names and say how many more there are."""
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return separator.join([*names[:limit], *more])


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


@contextlib.contextmanager
def blame(what: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """Turn errors of these kinds into a UserError: "{what}: {the error's message}"."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what}: {sentence(error)}") from None


def optional(module: str, extra: str, what: str) -> types.ModuleType:
    """Import a module of an extra. Raises UserError, which says how to install it, if that fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs the extra `{extra}` (pip install 'pixelflow_jax[{extra}]'): {sentence(error)}"
        ) from None
    except Exception as error:  # a system library, an environment variable
        raise UserError(
            f"{what} needs {module}, which is installed but cannot be imported: {sentence(error)}"
        ) from None
