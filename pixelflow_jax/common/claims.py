"""Claims of output folders: one process at a time, and one request only.

Every command that fills a folder claims it first. The folder keeps a description of the request; the
same request can complete it, and any other is refused.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from pixelflow_jax.common import UserError, blame, files, locks
from pixelflow_jax.common.removed import drop_removed


@dataclasses.dataclass(frozen=True)
class Description:
    """A folder's description of its request.

    Attributes:
      values: written as JSON to the file `name` in the folder.
      other: contents of a folder of another request, for the error: "samples of another request".
      name: name of the file.
      flag: the flag that names the folder, for errors.
      missing: what a folder without that file lacks, for the error (default: the file).
      beside: names of files that an unclaimed folder may contain.
      changes: returns how a folder's values differ from this request's, in words; empty if they agree
        (default: every key must be equal).
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

        Raises UserError if the folder is claimed for another request, or holds other files.
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
    """Lock a folder for a request while the context is active (locks.py); write its description.

    Yields whether the folder was already claimed for this request, and a function that raises Lost if
    another process has taken it. Raises UserError if the folder belongs to another request, holds other
    files, or is in use by a process.

    Args:
      folder: local or gs://; created if needed.
      description: the description of the request.
      barrier: waits for all processes of the run, if there may be several. All check the folder before
        process 0 takes it.
    """
    there = description.is_kept_in(folder)
    if barrier is not None:
        barrier("every process has checked the folder")
        if jax.process_index() != 0:
            yield there, lambda: None
            return
    with locks.held(folder, description.flag) as check:
        if not (there or description.is_kept_in(folder)):  # unless another process claimed it meanwhile
            files.write_json(epath.Path(folder) / description.name, description.values)
        yield there, check
