"""Buckets: image sizes of about equal area, and an order of the data with one size per batch.

Each image goes to the bucket with the nearest aspect ratio, so that little of it is cropped away. The
order is a function of (seed, step) alone, like everything else in the loader.
"""

import concurrent.futures
import contextlib
import functools

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int
from ml_collections import ConfigDict
from tqdm import tqdm

from pixelflow_jax.common import UserError, files
from pixelflow_jax.data.base import NO_SCAN, Scan
from pixelflow_jax.data.pixels import Size, read_size
from pixelflow_jax.data.transforms import nearest_size

SIZES = "image_sizes.npy"  # in a workdir
LEAST_AREA = 0.8  # of a bucket, relative to resolution^2
THREADS, AT_ONCE = 16, 1000  # threads that read image headers, images between reports
HEAD = 2**16  # bytes of a file that hold the size of most images


def bucket_sizes(data: ConfigDict) -> tuple[Size, ...]:
    """Return the sizes: multiples of bucket_unit of at most resolution^2 pixels, the square first.

    With max_aspect_ratio 1, that is the square alone.
    """
    area, unit = data.resolution**2, data.bucket_unit
    square = (data.resolution, data.resolution)
    if data.max_aspect_ratio == 1:
        return (square,)
    found = [square]
    for height in range(unit, area // unit + 1, unit):
        width = area // height // unit * unit
        ratio = max(height, width) / max(min(height, width), 1)
        if ratio <= data.max_aspect_ratio and height * width >= LEAST_AREA * area:
            found.append((height, width))
    return tuple(dict.fromkeys(found))


class Shuffled:
    """Every example once per epoch; `order[position]` is (index, the sizes it may become)."""

    def __init__(self, count: int, sizes: tuple[Size, ...], seed: int):
        self._indices = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
        self._sizes = sizes

    def __getitem__(self, position: int) -> tuple[int, tuple[Size, ...]]:
        return int(self._indices[position]), self._sizes


class BucketOrder:
    """Batches of one bucket each; `order[position]` is (index, (the bucket's size,)).

    An epoch has every image at most once. The rest of a bucket that fills no batch is left out, a
    different one in each epoch. Images of a bucket that cannot fill a batch go to the nearest that can.
    `ratios` is the stored (height, width) of each example. Raises UserError if no bucket fills a batch.
    """

    def __init__(
        self, ratios: Int[np.ndarray, "n 2"], sizes: tuple[Size, ...], batch_size: int, seed: int
    ):
        self.batch_size, self.seed = batch_size, seed
        pairs, inverse = np.unique(ratios, axis=0, return_inverse=True)
        while True:
            places = [sizes.index(nearest_size(sizes, *pair)) for pair in pairs.tolist()]
            places = np.array(places)[inverse.reshape(-1)]
            counts = np.bincount(places, minlength=len(sizes))
            kept = tuple(s for s, count in zip(sizes, counts, strict=True) if count >= batch_size)
            if not kept:
                raise UserError(
                    f"no bucket has the {batch_size} images that a batch needs (of {len(ratios)}, in "
                    f"{len(sizes)} buckets); lower config.batch_size or config.data.max_aspect_ratio"
                )
            if kept == sizes:
                break
            sizes = kept
        self.sizes = sizes
        self.members = [np.flatnonzero(places == i) for i in range(len(sizes))]
        self._batches = int((counts // batch_size).sum())  # per epoch

    def __getitem__(self, position: int) -> tuple[int, tuple[Size]]:
        step, place = divmod(position, self.batch_size)
        epoch, number = divmod(step, self._batches)
        bucket, indices = _epoch_of(self, epoch)[number]
        return int(indices[place]), (self.sizes[bucket],)


@functools.lru_cache(maxsize=4)  # not a method, as loaders pickle their order
def _epoch_of(order: BucketOrder, epoch: int) -> list[tuple[int, Int[np.ndarray, " b"]]]:
    """Return (bucket, indices) of an epoch's batches in order."""
    rng, size = np.random.default_rng((order.seed, epoch)), order.batch_size
    batches = []
    for bucket, members in enumerate(order.members):
        members = rng.permutation(members)
        full = members[: len(members) // size * size].reshape(-1, size)
        batches += [(bucket, batch) for batch in full]
    return [batches[i] for i in rng.permutation(len(batches))]


def make_order(source, config: ConfigDict, scan: Scan = NO_SCAN) -> Shuffled | BucketOrder:
    """Return the order of a run's data."""
    sizes = bucket_sizes(config.data)
    if len(sizes) == 1:
        return Shuffled(len(source), sizes, config.seed)
    return BucketOrder(read_sizes(source, scan), sizes, config.batch_size, config.seed)


def read_sizes(source, scan: Scan = NO_SCAN) -> Int[np.ndarray, "n 2"]:
    """Return (height, width) of every image without decoding it; broken ones count as squares.

    Every process reads a share. The workdir keeps the result for the next start.
    """
    sizes, path = np.zeros(0), scan.workdir and scan.workdir / SIZES
    if path and path.exists():
        with path.open("rb") as file:
            sizes = np.load(file, allow_pickle=False)
    known = np.array(sizes.shape == (len(source), 2))
    if np.all(multihost_utils.process_allgather(known)):  # a network disk may show it to some only
        return sizes

    mine = range(jax.process_index(), len(source), jax.process_count())
    share = np.ones((-(-len(source) // jax.process_count()), 2), np.int32)
    bar = tqdm(
        desc="image sizes", total=len(mine), unit="image", disable=jax.process_index() > 0, leave=False
    )
    with bar, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for begin in range(0, len(mine), AT_ONCE):
            scan.watch(f"size of image {begin}")
            found = list(pool.map(functools.partial(_size, source), mine[begin : begin + AT_ONCE]))
            share[begin : begin + len(found)] = found
            bar.update(len(found))
    gathered = multihost_utils.process_allgather(share)  # [processes, share, 2], or the share alone
    gathered = np.asarray(gathered).reshape(jax.process_count(), -1, 2)
    sizes = gathered.swapaxes(0, 1).reshape(-1, 2)[: len(source)]
    if path and jax.process_index() == 0:
        with files.create(path) as file:
            np.save(file, sizes)
    return sizes


def _size(source, index: int) -> Size:
    with contextlib.suppress(Exception):  # some formats have their sizes at the end
        return read_size(source.head(index, HEAD))
    with contextlib.suppress(Exception):  # however it is broken, the loader replaces and counts it
        return read_size(source[index][0])
    return (1, 1)
