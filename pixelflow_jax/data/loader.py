"""Load batches by index through Grain: the batch of step n is a function of (seed, n) alone.

The stream of positions 0, 1, 2, ... runs through the epochs, each in its own order (buckets.py). Batch n
is the positions [n B, (n + 1) B). So a run's place in its data is its step number, and an example is the
same whichever process, worker or device gets it.
"""

import concurrent.futures
import contextlib
import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from pixelflow_jax.data.base import Source
from pixelflow_jax.data.buckets import BucketOrder, Shuffled, bucket_sizes, make_order
from pixelflow_jax.data.pixels import Size
from pixelflow_jax.data.texts import some
from pixelflow_jax.data.transforms import transform
from pixelflow_jax.text.encoder import make_text_reader, make_tokenizer, warn_of_cuts

NO_GUARD = (
    "worker processes import the script that starts them, and importing this one starts a training or "
    'fails. Put its code below `if __name__ == "__main__":`, or set config.data.num_workers=0, which '
    "loads in threads"
)
LOOKED_AT, THREADS = 1000, 16  # captions whose length is checked before a run
REPLACEMENTS = 8  # attempts to replace a broken image; then it is black


class LoadExample(grain.transforms.RandomMap):
    """Read and transform an example; replace a broken one by another.

    Grain seeds `rng` by (seed, position), so crop, flip and replacement are pure functions of those.
    "broken" is the index of the broken example, or -1.
    """

    def __init__(self, source: Source, config: ConfigDict):
        data = config.data
        self._source, self._dropout = source, data.label_dropout
        self._encode = make_text_reader(config) if config.model.context_dim else None
        self._crop, self._flip = data.crop, data.flip

    def random_map(
        self, entry: tuple[int, tuple[Size, ...]], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Return {"image", "broken", and the label or caption}, which make_batches stacks."""
        (index, sizes), broken = entry, -1
        for _ in range(REPLACEMENTS):
            try:
                data, label = self._source[index]
                label = some(label) if isinstance(label, tuple) else label
                image = transform(data, sizes, self._crop, self._flip, rng)
                break
            except OSError:
                broken = index if broken < 0 else broken
                index = int(rng.integers(len(self._source)))
        else:
            image = np.zeros((*sizes[0], 3), np.uint8)
            label = ("",) if self._encode else 0
        found = {"image": image, "broken": np.int32(broken)}
        if self._encode is None:
            return found | {"labels": np.int32(label)}
        text = label[int(rng.integers(len(label)))]
        text = "" if rng.random() < self._dropout else text
        return found | {name: x[0] for name, x in self._encode([text]).items()}


def make_examples(source: Source, config: ConfigDict, order=None) -> grain.MapDataset:
    """Return the examples by position in `order` (default: the config's)."""
    order = make_order(source, config) if order is None else order
    positions = grain.MapDataset.range(sys.maxsize).seed(config.seed)
    return positions.map(order.__getitem__).random_map(LoadExample(source, config))


def make_batches(
    source: Source,
    config: ConfigDict,
    first_step: int = 0,
    rows: np.ndarray | None = None,
    order: Shuffled | BucketOrder | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Return an endless iterator over batches, read ahead by threads or worker processes.

    Args:
      source, config: `config.batch_size` is the global batch.
      first_step: number of the first batch.
      rows: entries of the global batch that this process loads; None for all.
      order: which example stands where (default: the config's).

    Returns an iterator over {"image": uint8 [b, H, W, 3], "broken": int32 [b]} and, of class models,
    {"labels": int32 [b]}, of text models {"text_ids": int32 [b, t], "text_mask": bool [b, t]} or, from a
    cache, {"context": bfloat16 [b, t, c], "context_mask": bool [b, t]}.
    """
    examples, size = make_examples(source, config, order), config.batch_size
    rows = np.arange(size) if rows is None else rows

    def local(position: int):
        step, place = divmod(int(position), len(rows))
        return examples[step * size + int(rows[place])]

    stream = grain.MapDataset.range(sys.maxsize // size).map(local)
    batches = stream.batch(len(rows))[first_step:]
    data = config.data
    if data.num_workers:
        _try_worker()
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which our commands do not use
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        workers = grain.MultiprocessingOptions(data.num_workers, per_worker_buffer_size=data.prefetch)
        return _from_workers(batches.to_iter_dataset(options).mp_prefetch(workers, _guard_worker))
    threads = min(data.num_threads, data.prefetch)  # a thread loads one batch
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=data.prefetch)
    return iter(batches.to_iter_dataset(options))


def _from_workers(batches: grain.IterDataset) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches of worker processes. Raises OSError, which says what may help, if one ends."""
    try:
        yield from batches
    except (RuntimeError, OSError) as error:
        ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        full = getattr(error, "errno", None) == errno.ENOSPC  # loaders write nowhere else
        if not ended and not full:
            raise
        code = int(ended[1]) if ended else 0
        if full or code == -signal.SIGBUS:
            why = (
                "/dev/shm, through which they send batches, is full: make it larger (docker run "
                "--shm-size=8g), empty it, or set config.data.num_workers=0, which loads in threads"
            )
        elif code < 0:
            why = f"one was ended by {signal.Signals(-code).name}; if memory ran out, lower their number"
        else:
            why = f"one ended with code {code}; its output is above"
        raise OSError(f"the worker processes of the loader (config.data.num_workers): {why}") from error


def check_main_guard() -> None:
    """Raise RuntimeError in a worker that is running the script that started it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(NO_GUARD)


def _try_worker() -> None:
    """Raise RuntimeError if the running script cannot be imported, as each worker does.

    Grain would wait forever for the batches of such workers.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith("pixelflow_jax."):  # our commands can be imported
        process = multiprocessing.get_context("spawn").Process(target=int)
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{NO_GUARD} (a process ended with code {process.exitcode}, see above)")


def _guard_worker(index: int, count: int) -> None:
    """Keep a worker process alive through a SIGTERM, and end it with its parent.

    A scheduler signals the whole group, and the parent needs batches until it has saved. After a SIGKILL
    of the parent, nothing else would stop its workers.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=end_with_parent, daemon=True).start()


def look_at_captions(source: Source, config: ConfigDict) -> None:
    """Warn of captions above the length limit among LOOKED_AT spread over the data."""
    texts, length = captions(source, max(len(source) // LOOKED_AT, 1)), config.text.max_length
    warn_of_cuts(texts, make_tokenizer(config)(texts, length).cut, length, "caption")


def captions(source: Source, every: int = 1) -> list[str]:
    """Return all captions that can be read of every so many examples."""

    def read(index: int) -> tuple[str, ...]:
        with contextlib.suppress(OSError):
            return source.captions(index)
        return ()

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [text for found in pool.map(read, range(0, len(source), every)) for text in found]


def why_broken(source: Source, index: int, data: ConfigDict) -> str:
    """Return a line about a broken example: its name and what is wrong with it."""
    try:
        transform(source[index][0], bucket_sizes(data), data.crop, False, np.random.default_rng(0))
    except OSError as error:
        return f"{source.name(index)}: {error}"
    return f"{source.name(index)}: reading it again succeeded"
