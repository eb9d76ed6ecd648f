"""Whose an output folder is: one process's at a time, and one request's for good.

Every command that fills a folder claims it first. The folder keeps a description of what was asked; the
same request completes it, any other is refused.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from pixelflow_jax.common import files, locks
from pixelflow_jax.common.errors import UserError, blame
from pixelflow_jax.common.removed import drop_removed


@dataclasses.dataclass(frozen=True)
class Description:
    """What a folder says of the request that it is filled for.

    Attributes:
      values: written as JSON to the folder's file `name`.
      other: what a folder of another request holds, for the error: "samples of another request".
      name: of the file.
      flag: that names the folder, for errors.
      missing: what a folder without that file lacks, for the error (default: the file).
      beside: names of files that may lie in a folder that nobody has claimed.
      changes: returns why the values that a folder keeps are of another request, in words; empty if
        they are of this one (default: every key must be equal).
    """

    values: dict[str, Any]
    other: str
    name: str = "settings.json"
    flag: str = "--out"
    missing: str = ""
    beside: tuple[str, ...] = ()
    changes: Callable[[dict[str, Any]], list[str]] | None = None

    def is_kept_in(self, folder: epath.PathLike) -> bool:
        """Return whether `folder` is claimed for this request; if not, it is new or empty.

        Raises:
          UserError: if the folder is claimed for another request, or holds other files.
        """
        names, where = files.list_files(folder), f"{self.flag}={folder}"
        if self.name not in names:
            if set(names) - {*self.beside}:
                missing = self.missing or self.name
                raise UserError(f"{where} holds files but no {missing}; name a new or empty folder")
            return False
        path = epath.Path(folder) / self.name
        kept = files.read_json(path)
        with blame(f"{path} does not say what {where} holds", (KeyError, TypeError, AttributeError)):
            changed = (self.changes or self._unequal)(kept)
        if changed:
            raise UserError(f"{where} holds {self.other} ({'; '.join(changed)}); name a new folder")
        return True

    def _unequal(self, kept: dict[str, Any]) -> list[str]:
        kept, effects = drop_removed(kept)
        names = [x for x in {**self.values, **kept} if kept.get(x) != self.values.get(x)]
        found = [f"{effect}, which was removed" for effect in effects]
        return [f"{', '.join(names)} differ", *found] if names else found


@contextlib.contextmanager
def claim(
    folder: epath.PathLike, description: Description, barrier: Callable[[str], None] | None = None
) -> Iterator[tuple[bool, Callable[[], None]]]:
    """Hold a folder for one request to the block's end (see locks.py), and write its description there.

    Args:
      folder: local or gs://; made if it is not there.
      description: of the request.
      barrier: waits for all processes of the run, where there may be several. They all look at the
        folder before process 0 takes it.

    Yields:
      Whether the folder was claimed for this request before, and a function that raises Lost if another
      process has taken it since.

    Raises:
      UserError: if the folder is of another request, holds other files, or a process is in it.
    """
    there = description.is_kept_in(folder)
    if barrier is not None:
        barrier("every process has looked at the folder")
        if jax.process_index() != 0:
            yield there, lambda: None
            return
    with locks.held(folder, description.flag) as check:
        if not (there or description.is_kept_in(folder)):  # nobody has come in between
            files.write_json(epath.Path(folder) / description.name, description.values)
        yield there, check
