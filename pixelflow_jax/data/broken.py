"""Count images that could not be read, and stop a run that has too many."""

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from pixelflow_jax.common import UserError, listed, log
from pixelflow_jax.data.loader import why_broken
from pixelflow_jax.data.sources import Source

LISTED = 20  # broken images that the error lists


class BrokenImages:
    """A count over the global batch, so that every process reaches the same verdict.

    A run stops when more than `data.max_broken_share` of the images seen were broken, unless they are a
    few of a small data set that come round again.
    """

    def __init__(self, source: Source, data: ConfigDict):
        self._source, self._data = source, data
        self._seen = self._count = 0
        self._found: dict[int, str] = {}

    def add(self, indices: Int[np.ndarray, " b"]) -> None:
        """Add the batch entry "broken": for every image, a broken example's index, or -1.

        Raises UserError with the list, when the share is exceeded.
        """
        indices = np.asarray(indices, np.int64)
        broken = indices[indices >= 0]
        self._seen += len(indices)
        self._count += len(broken)
        for index in broken.tolist():
            if index not in self._found and len(self._found) < 10_000:
                why = why_broken(self._source, index, self._data)
                self._found[index] = why
                log.warning("broken image %d, another takes its place: %s", len(self._found), why)
        share = self._data.max_broken_share
        several = len(self._found) > share * min(len(self._source), 1000)
        if self._count > share * self._seen and several:
            names = listed(list(self._found.values()), LISTED, "\n  ")
            raise UserError(
                f"{self._count} of {self._seen} images could not be read, more than "
                f"config.data.max_broken_share={share}:\n  {names}"
            )
