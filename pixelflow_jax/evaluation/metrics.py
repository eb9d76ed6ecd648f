"""The metrics in float64: Frechet distance, Inception Score, precision and recall.

The definitions follow ADM's evaluator (Dhariwal and Nichol, arXiv 2105.05233, and its released code), so
that results are comparable with the literature.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
import scipy.linalg
from jax.experimental import multihost_utils
from jaxtyping import Float

SPLIT = 5000  # images per split of the Inception Score, as in ADM
NEIGHBOURS = 3  # k: the distance to the k-th neighbour is a point's radius
BLOCK, TILE = 1024, 4096  # rows of distances at a time, and columns per product


@dataclasses.dataclass
class Moments:
    """Mean and covariance of `count` vectors, accumulated over batches and processes.

    `scatter` is the sum of outer products of the deviations from the mean.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """Return the moments of no vectors."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, x: Float[np.ndarray, "n d"]) -> None:
        """Add vectors."""
        if len(x):
            x = np.asarray(x, np.float64)
            mean = x.mean(axis=0)
            x = x - mean
            self.merge(Moments(len(x), mean, x.T @ x))

    def merge(self, other: "Moments") -> None:
        """Add the moments of other vectors (Chan, Golub and LeVeque, 1979)."""
        if not other.count:
            return
        total, gap = self.count + other.count, other.mean - self.mean
        self.scatter = self.scatter + other.scatter
        self.scatter += np.outer(gap, gap) * (self.count * other.count / total)
        self.mean = self.mean + gap * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The covariance, with n - 1 in the denominator as in numpy.cov and ADM."""
        return self.scatter / (self.count - 1)


def frechet_distance(
    mean1: Float[np.ndarray, " d"],
    cov1: Float[np.ndarray, "d d"],
    mean2: Float[np.ndarray, " d"],
    cov2: Float[np.ndarray, "d d"],
) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al., arXiv 1706.08500).

    The trace of the root is computed as the sum of the singular values of C1^(1/2) C2^(1/2). This is
    real, and accurate for singular covariances, such as those of fewer images than dimensions.
    """
    roots = []
    for cov in (cov1, cov2):
        values, vectors = scipy.linalg.eigh(cov)
        roots.append((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)
    overlap = scipy.linalg.svdvals(roots[0] @ roots[1]).sum()
    gap = mean1 - mean2
    return float(gap @ gap + np.trace(cov1) + np.trace(cov2) - 2 * overlap)


def inception_score(logits: Float[np.ndarray, "n classes"], split: int = SPLIT) -> float:
    """Return exp of the mean KL divergence of p(class | image) from p(class), averaged over splits.

    `logits` exclude the bias, as in ADM's evaluator.
    """
    logits = np.asarray(logits, np.float64)
    scores = []
    for begin in range(0, len(logits), split):
        part = logits[begin : begin + split]
        log_p = part - scipy.special.logsumexp(part, axis=1, keepdims=True)
        p = np.exp(log_p)
        log_marginal = np.log(np.maximum(p.mean(axis=0), 1e-300))
        scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))


class TooFewImages(ValueError):
    """A set has too few images for every point to have k neighbours."""


def precision_recall(
    reference: Float[np.ndarray, "n d"],
    samples: Float[np.ndarray, "m d"],
    k: int = NEIGHBOURS,
    watch: Callable[[str], None] = lambda what: None,
) -> tuple[float, float]:
    """Return (precision, recall): the share of samples on the reference's manifold, and vice versa.

    A manifold is the union of balls around all points, each with the distance to its k-th neighbour as
    radius (Kynkaanniemi et al., arXiv 1904.06991). All processes hold all vectors and call this
    together; each of n processes computes every n-th block of distances on its CPU in float64. `watch`
    is called with the current position, because 50,000 images on both sides take many minutes. Raises
    TooFewImages if a set has no more than k images.
    """
    if min(len(reference), len(samples)) <= k:
        raise TooFewImages(f"precision and recall need more than {k} images on both sides")
    return (
        _share_inside(samples, reference, _radii(reference, k, watch), watch),
        _share_inside(reference, samples, _radii(samples, k, watch), watch),
    )


def gather(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "processes ..."]:
    """Gather an array from every process, bit for bit (JAX itself would round float64 to float32)."""
    words = np.ascontiguousarray(x).view(np.uint32)
    return np.ascontiguousarray(multihost_utils.process_allgather(words)).view(x.dtype)


def _total(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the sum over processes."""
    return x if jax.process_count() == 1 else gather(x).sum(axis=0)


def _square_distances(
    points: np.ndarray, centres: np.ndarray, watch: Callable[[str], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the first point, distances [block, centres]) for this process's blocks of points.

    Each block overwrites the previous one.
    """
    process, processes = jax.process_index(), jax.process_count()
    size = min(BLOCK, -(-len(points) // processes))
    memory = np.empty((size, len(centres)))
    for begin in range(process * size, len(points), processes * size):
        watch(f"distances of image {begin}")
        block = np.asarray(points[begin : begin + size], np.float64)
        lengths, squares = (block**2).sum(1)[:, None], memory[: len(block)]
        for at in range(0, len(centres), TILE):
            tile, found = np.asarray(centres[at : at + TILE], np.float64), squares[:, at : at + TILE]
            np.matmul(2 * block, tile.T, out=found)
            np.subtract(lengths + (tile**2).sum(1), found, out=found)
        yield begin, np.maximum(squares, 0, out=squares)


def _radii(x: np.ndarray, k: int, watch: Callable[[str], None]) -> np.ndarray:
    """Return the squared distance of each point to its k-th neighbour, not counting itself."""
    radii = np.zeros(len(x))
    for begin, squares in _square_distances(x, x, watch):
        rows = np.arange(len(squares))
        squares[rows, begin + rows] = -1.0  # sorts the point itself first, regardless of rounding
        squares.partition(k, axis=1)
        radii[begin : begin + len(squares)] = squares[:, k]
    return _total(radii)


def _share_inside(
    points: np.ndarray, centres: np.ndarray, radii: np.ndarray, watch: Callable[[str], None]
) -> float:
    inside = np.zeros(1)
    for _, squares in _square_distances(points, centres, watch):
        inside += (squares <= radii).any(axis=1).sum()
    return float(_total(inside)[0]) / len(points)
