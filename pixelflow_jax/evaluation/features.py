"""Features of images: Inception-v3's, or principal components if its weights are not available."""

import hashlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, UInt8
from tqdm import tqdm

from pixelflow_jax.common import UserError
from pixelflow_jax.evaluation.metrics import Moments, gather
from pixelflow_jax.evaluation.sets import ImageSet
from pixelflow_jax.foreign.weights import read_state
from pixelflow_jax.models.inception import Inception, inception_names, inception_params

KEPT = ("2048", "spatial", "logits_unbiased")
PCA_DIM, PCA_SIDE, PCA_FIT = 64, 32, 10_000  # dimensions, pixels per side, images to fit on
MERGED = 2000  # vectors added to the moments at once
Features = dict[str, Float[np.ndarray, "b d"]]


class InceptionFeatures:
    """FID's Inception-v3 on all local devices, in float32 whatever the chip's default.

    `pooled`, `spatial` and `logits` are the keys of the features for FID, sFID and the Inception Score.
    """

    arithmetic = "float32, products at JAX's highest precision"
    pooled, spatial, logits = KEPT

    def __init__(self, path: str):
        params = inception_params(read_state(path, inception_names().__contains__))
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(params):
            digest.update(np.ascontiguousarray(leaf).data)
        self.name = f"FID Inception-v3 (weights {digest.hexdigest()[:12]}), TF1 bilinear resize to 299"
        self._mesh = Mesh(np.array(jax.local_devices()), ("images",))
        self._params = jax.device_put(params, NamedSharding(self._mesh, P()))

        def apply(params, pixels):
            found = Inception().apply({"params": params}, pixels)
            return {name: found[name] for name in KEPT}

        self._apply = jax.jit(
            jax.shard_map(apply, mesh=self._mesh, in_specs=(P(), P("images")), out_specs=P("images"))
        )

    def __call__(self, pixels: UInt8[np.ndarray, "b h w 3"], size: int) -> Features:
        """Return the features of a batch, padded to `size` so that there is only one compilation."""
        size = -(-size // self._mesh.size) * self._mesh.size
        padded = pixels[np.arange(size) % len(pixels)]
        found = jax.device_get(self._apply(self._params, padded))
        return {name: np.asarray(x[: len(pixels)]) for name, x in found.items()}


class PcaFeatures:
    """Principal components of the reference's pixels: a distance between image sets, but not FID.

    Images with more than 32 pixels per side are averaged down first.
    """

    arithmetic = "float64"
    pooled, spatial, logits = "pca", None, None

    def __init__(self, reference: ImageSet):
        from sklearn.decomposition import PCA

        step = max(1, reference.count // PCA_FIT)
        batches = enumerate(reference.batches(1000))
        parts = [_flat(batch[-1000 * number % step :: step]) for number, batch in batches]
        flat = np.concatenate(parts)[:PCA_FIT]
        dim = min(PCA_DIM, len(flat) - 1, flat.shape[1])
        if dim < 1:
            raise UserError(f"{reference.name} has too few images for principal components")
        self._pca = PCA(dim, svd_solver="full").fit(flat)
        self.name = f"{dim} principal components of the reference's pixels (this is not FID)"

    def __call__(self, pixels: UInt8[np.ndarray, "b h w 3"], size: int) -> Features:
        """Return the features of a batch; `size` is not used."""
        flat = _flat(pixels)
        if flat.shape[1] != self._pca.n_features_in_:
            raise UserError("with --features=pca, samples and reference must be of one size")
        return {"pca": self._pca.transform(flat)}


def _flat(pixels: np.ndarray) -> np.ndarray:
    """Convert [n, H, W, 3] uint8 to [n, D] in [0, 1], with at most 32 pixels per side."""
    n, height, width, _ = pixels.shape
    down, right = -(-height // PCA_SIDE), -(-width // PCA_SIDE)  # pixels to average
    rows, columns = height // down, width // right
    whole = pixels[:, : rows * down, : columns * right]
    blocks = whole.reshape(n, rows, down, columns, right, 3)
    return blocks.mean(axis=(2, 4)).reshape(n, -1) / 255


class Collected:
    """Features of an image set: moments of pooled and spatial features, and the requested vectors."""

    def __init__(self):
        self.moments: dict[str, Moments] = {}
        self.vectors: dict[str, np.ndarray] = {}


def collect(
    extract: Callable[[np.ndarray, int], Features],
    images: ImageSet,
    batch_size: int,
    keep: tuple[str, ...],
    watch: Callable[[str], None] = lambda what: None,
) -> Collected:
    """Stream an image set through `extract`; collect moments in float64 and the vectors named in `keep`.

    Each of several processes takes a part, and all get the same result. Kept vectors are in the order of
    the images. `watch` is called with the current position. Raises UserError if there are fewer images
    than processes.
    """
    process, processes = jax.process_index(), jax.process_count()
    if images.count < processes:
        raise UserError(f"{images.name} has {images.count} images for {processes} processes")
    batch_size = min(batch_size, images.count // processes)  # so that every process gets a batch
    total = -(-images.count // batch_size)
    result, kept = Collected(), {name: [] for name in keep}
    bar = tqdm(total=-(-total // processes), unit="batch", desc=images.name[-40:], disable=process > 0)
    rows: dict[str, list[np.ndarray]] = {}  # pending vectors: every merge updates a whole covariance

    def merge() -> None:
        for name, parts in rows.items():
            moments = result.moments.setdefault(name, Moments.empty(parts[0].shape[1]))
            moments.add(np.concatenate(parts))
        rows.clear()

    with bar:
        for number, pixels in enumerate(images.batches(batch_size, process, processes)):
            watch(f"batch {number} of {images.name}")
            for name, x in extract(pixels, batch_size).items():
                if name != "logits_unbiased":
                    rows.setdefault(name, []).append(x)
                if name in keep:
                    kept[name].append(x)
            if (number + 1) % max(1, MERGED // batch_size) == 0:
                merge()
            bar.update()
    merge()
    if processes > 1:
        _share(result, kept, batch_size, images.count)
    else:
        result.vectors = {name: np.concatenate(parts) for name, parts in kept.items()}
    return result


def _share(result: Collected, kept: dict[str, list], batch_size: int, count: int) -> None:
    """Combine the moments and vectors of all processes, on every process."""
    for name in sorted(result.moments):
        own = result.moments[name]
        parts = [gather(x) for x in (np.array([float(own.count)]), own.mean, own.scatter)]
        merged = Moments.empty(len(own.mean))
        for size, mean, scatter in zip(*parts, strict=True):
            merged.merge(Moments(int(size[0]), mean, scatter))
        result.moments[name] = merged
    processes = jax.process_count()
    rounds = -(-count // (batch_size * processes))
    for name, parts in kept.items():
        full = np.zeros((rounds, batch_size, parts[0].shape[1]), parts[0].dtype)
        for i, part in enumerate(parts):
            full[i, : len(part)] = part
        everyone = gather(full)  # [process, round, batch, dim]
        result.vectors[name] = everyone.swapaxes(0, 1).reshape(-1, full.shape[-1])[:count]
