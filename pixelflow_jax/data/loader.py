"""Batches by index: what stands at step n is a function of (seed, n), so a position is one number."""

from collections.abc import Iterator

import numpy as np

from pixelflow_jax.data.sources import Examples


class Loader:
    """An endless stream of shuffled batches over examples in memory.

    Epoch e visits every example once, in an order drawn from (seed, e). Batches run on across
    epochs, so none is short and no example is dropped.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch in use

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of `step`: {"image": uint8 [B, H, W, 3], "label": int32 [B]}."""
        first = step * self.batch_size
        index = np.array([self._example(first + i) for i in range(self.batch_size)])
        return {"image": self.examples.images[index], "label": self.examples.labels[index]}

    def iterate(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches from `start_step` on, without end."""
        while True:
            yield self.batch(start_step)
            start_step += 1

    def _example(self, position: int) -> int:
        epoch, place = divmod(position, len(self.examples.labels))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples.labels))
            self._order = epoch, order
        return self._order[1][place]
