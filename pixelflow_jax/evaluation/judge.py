"""Evaluate a set of samples against a reference: which metrics, by which protocol."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from pixelflow_jax.common import UserError, files
from pixelflow_jax.evaluation import metrics
from pixelflow_jax.evaluation.features import Collected, InceptionFeatures, PcaFeatures, collect
from pixelflow_jax.evaluation.sets import ImageSet, has_images, open_images, statistics_in

MOST_FOR_RECALL = 50_000  # largest reference for which precision and recall are computed
USUAL = 50_000  # number of samples in published FIDs


class Reference:
    """What samples are compared with: images, statistics of Inception features, or both.

    Raises UserError if it holds neither, or does not fit the features.
    """

    def __init__(
        self,
        path: str,
        inception: str | None,
        batch_size: int,
        resolution: int | None = None,
        watch: Callable[[str], None] = lambda what: None,
    ):
        self.path, self.batch_size, self._watch = path, batch_size, watch
        known = statistics_in(path) if inception else {}
        self.images = None
        if not known or has_images(path):
            self.images = open_images(path, "reference", resolution)
        if inception:
            self.extract = InceptionFeatures(inception)
            for name, size in (("mu", 2048), ("mu_s", 2023)):
                if name in known and known[name].shape != (size,):
                    raise UserError(
                        f"--reference={path}: {name} is {known[name].shape}, not of Inception's "
                        f"features, {(size,)}"
                    )
        else:
            self.extract = PcaFeatures(self.images)
        few = self.images is not None and self.images.count <= MOST_FOR_RECALL
        keep = (self.extract.pooled,) if few else ()
        found = Collected()
        if self.images is not None and (keep or not known):
            found = collect(self.extract, self.images, batch_size, keep, watch)
        self.vectors = found.vectors.get(self.extract.pooled)
        self.statistics = known or self._statistics(found.moments, f"--reference={path}")

    def _statistics(self, moments: dict[str, metrics.Moments], what: str) -> dict[str, np.ndarray]:
        """Return statistics by ADM's names."""
        if min(x.count for x in moments.values()) < 2:
            raise UserError(f"{what} needs at least two images")
        values = {}
        for suffix, name in (("", self.extract.pooled), ("_s", self.extract.spatial)):
            if name:
                values[f"mu{suffix}"] = moments[name].mean
                values[f"sigma{suffix}"] = moments[name].covariance
        return values

    def judge(self, samples: ImageSet) -> dict[str, Any]:
        """Return all metrics of a set of samples, with what is needed to reproduce them."""
        extract = self.extract
        keep = tuple(name for name in (extract.pooled, extract.logits) if name)
        found = collect(extract, samples, self.batch_size, keep, self._watch)
        statistics = self._statistics(found.moments, samples.name)

        def distance(mean: str, cov: str) -> float | None:
            ours, known = statistics, self.statistics
            if mean not in known:
                return None
            return metrics.frechet_distance(known[mean], known[cov], ours[mean], ours[cov])

        prefix = "" if extract.spatial else "pca_"
        result: dict[str, Any] = {"pca_frechet" if prefix else "fid": distance("mu", "sigma")}
        if extract.spatial:
            result["sfid"] = distance("mu_s", "sigma_s")
            result["inception_score"] = metrics.inception_score(found.vectors[extract.logits])
        result[f"{prefix}precision"] = result[f"{prefix}recall"] = None
        if self.vectors is not None:
            with contextlib.suppress(metrics.TooFewImages):
                vectors = found.vectors[extract.pooled]
                both = metrics.precision_recall(self.vectors, vectors, watch=self._watch)
                result[f"{prefix}precision"], result[f"{prefix}recall"] = both
        if prefix:
            result["pca_frechet_of_reference_halves"] = self._floor()
        return result | self._protocol(samples)

    def _floor(self) -> float | None:
        """Return the distance between two halves of the reference: smaller distances are noise."""
        if self.vectors is None or len(self.vectors) < 4:
            return None
        halves = [metrics.Moments.empty(self.vectors.shape[1]) for _ in range(2)]
        for i, half in enumerate(halves):
            half.add(self.vectors[i::2])
        first, second = halves
        return metrics.frechet_distance(first.mean, first.covariance, second.mean, second.covariance)

    def _protocol(self, samples: ImageSet) -> dict[str, Any]:
        return {
            "num_samples": samples.count,
            "num_reference": self.images.count if self.images else None,
            "features": self.extract.name,
            "arithmetic": self.extract.arithmetic,
            "uint8_rule": uint8_rule(samples.name),
            "samples": samples.name,
            "reference": self.path,
            "statistics": "float64; covariance over n - 1",
            "precision_recall": f"k = {metrics.NEIGHBOURS}, float64 distances",
            "splits": f"Inception Score: of {metrics.SPLIT}, logits without bias",
        }


def uint8_rule(path: str) -> str:
    """Return how samples became uint8, according to the settings beside them, if known."""
    place = epath.Path(path)
    folder = place if place.is_dir() else place.parent
    with contextlib.suppress(UserError, TypeError, AttributeError):
        return files.read_json(folder / "settings.json").get("uint8_rule", "not known")
    return "not known: as the files have it"
