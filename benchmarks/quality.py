"""Measure the quality of the default config's samples against held-out real digits.

    python benchmarks/quality.py                                  trains three seeds, about 25 minutes
    python benchmarks/quality.py --checkpoints runs/a runs/b      judges these checkpoints

Prints for each checkpoint: the conditional accuracy according to an RBF SVC fitted on the real training
split; the Frechet distance from samples to held-out images in 32 PCA dimensions of the training split,
relative to the distance from training split to held-out images; and the median distance to the nearest
training image, relative to that of held-out images (memorization shows as a ratio far below 1). Then
prints the medians and bars.
"""

import argparse
import pathlib
import tempfile
import time

import jax
import numpy as np
import scipy.linalg
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

from pixelflow_jax.common.memory import restart_with_huge_pages
from pixelflow_jax.config import load_config
from pixelflow_jax.data.sources import load_source
from pixelflow_jax.sampling.generate import build_sampler, make_generate, save_grid
from pixelflow_jax.sampling.sampler import class_conditions
from pixelflow_jax.sampling.starts import FromSeed
from pixelflow_jax.training.checkpoints import load_params
from pixelflow_jax.training.loop import train

BARS = {"accuracy": (0.97, "at least"), "frechet": (2.0, "at most"), "nearest": (0.8, "at least")}


def flat(images: np.ndarray) -> np.ndarray:
    """Convert [N, H, W, 3] uint8 to [N, H * W] grey in [0, 1]."""
    return images.mean(-1).reshape(len(images), -1) / 255


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of vectors."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(gap + np.trace(cov_a + cov_b - 2 * root))


class Judge:
    """Judges fitted on the real training split only, or on 10,000 images of it if there are more."""

    def __init__(self, config):
        real, self.held_out = load_source(config, "train"), load_source(config, "test")
        chosen = np.random.default_rng(0).permutation(len(real))[:10_000]
        x, y = flat(real.images[chosen]), flat(self.held_out.images)
        self.classifier = SVC(C=10).fit(x, real.labels[chosen])
        self.pca = PCA(32).fit(x)
        self.nearest = NearestNeighbors(n_neighbors=1).fit(x)
        self.real_accuracy = self.classifier.score(y, self.held_out.labels)
        self.target = self.pca.transform(y)
        self.real_frechet = frechet(self.pca.transform(x), self.target)
        self.real_nearest = np.median(self.nearest.kneighbors(y)[0])

    def scores(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the three metrics for samples and their requested labels."""
        z = flat(images)
        return {
            "accuracy": float(self.classifier.score(z, labels)),
            "frechet": frechet(self.pca.transform(z), self.target) / self.real_frechet,
            "nearest": float(np.median(self.nearest.kneighbors(z)[0]) / self.real_nearest),
        }


def draw(checkpoint: str, count: int, scale: float | None = None, ema: float | None = None):
    """Return (samples with balanced labels, labels, config); `scale` overrides the config's guidance."""
    params, config, _ = load_params(checkpoint, ema)
    if scale is not None:
        config.sample.guidance_scale = scale
    start = FromSeed(config.seed + 1000)
    generate = make_generate(build_sampler(config), start)
    classes = config.model.num_classes
    labels = np.arange(count, dtype=np.int32) % classes
    parts = []
    for begin in range(0, count, 250):
        index = np.arange(begin, begin + 250)
        made = generate(params, start.inputs(index), *class_conditions(labels[index % count], classes))
        parts.append(jax.device_get(made.pixels))
    return np.concatenate(parts)[:count], labels, config


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", nargs="+", help="workdirs (default: train three seeds)")
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--workdir", help="where to train (default: a temporary folder)")
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--guidance_scales", type=float, nargs="+", help="also judge these scales")
    args = parser.parse_args()
    checkpoints, seconds = args.checkpoints or [], {}
    if not checkpoints:
        folder = pathlib.Path(args.workdir or tempfile.mkdtemp(prefix="quality-"))
        for seed in range(args.seeds):
            begin = time.perf_counter()
            train(load_config(args.config, [f"seed={seed}", "sample_every=0"]), folder / f"{seed}")
            checkpoints.append(str(folder / f"{seed}"))
            seconds[checkpoints[-1]] = time.perf_counter() - begin

    judge, results = None, []
    for scale in [None, *(args.guidance_scales or [])]:
        for checkpoint in checkpoints:
            images, labels, config = draw(checkpoint, args.num_samples, scale)
            if judge is None:
                judge = Judge(config)
                print(
                    f"held-out real images: accuracy {judge.real_accuracy:.1%}, ratios 1 by definition"
                )
            scores = judge.scores(images, labels)
            trained = f", trained in {seconds[checkpoint]:.0f} s" if checkpoint in seconds else ""
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            print(
                f"{checkpoint}, guidance {config.sample.guidance_scale}: {numbers}{trained}", flush=True
            )
            if scale is None:
                results.append(scores)
                save_grid(pathlib.Path(checkpoint) / "quality.png", images)
    for name, (bar, word) in BARS.items():
        median = float(np.median([scores[name] for scores in results]))
        met = median >= bar if word == "at least" else median <= bar
        print(f"median {name}: {median:.3f}, bar {word} {bar}: {'met' if met else 'NOT met'}")


if __name__ == "__main__":
    restart_with_huge_pages()  # as the commands do
    main()
