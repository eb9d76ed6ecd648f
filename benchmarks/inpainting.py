"""Draw the lower half of held-out digits anew, and judge the results.

    python benchmarks/inpainting.py --checkpoint=runs/digits [--grid=docs/inpainting.png]

The model is given the upper half and the label. An RBF SVC fitted on the real training split
(quality.py) reads the results. Beside them: the real images; the half left blank; and the half of a
sample with that label which knows nothing of the image. "Edge" is the mean absolute step between the two
rows at the mask's edge, relative to that of the real images. Prints a Markdown table.
"""

import argparse
import pathlib

import numpy as np
from quality import Judge

from pixelflow_jax.common.memory import restart_with_huge_pages
from pixelflow_jax.pipeline import Pipeline
from pixelflow_jax.sampling.generate import save_grid

SHOWN = 10  # columns of the grid


def edge(images: np.ndarray, row: int) -> float:
    """Return the mean absolute step from row - 1 to row, of uint8 images [N, H, W, 3]."""
    return float(np.abs(images[:, row].astype(float) - images[:, row - 1]).mean())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="workdir of configs/digits.py")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--resample", type=int, nargs="+", default=[0, 1, 2, 5])
    parser.add_argument("--grid", help="PNG file to write: real, masked, and one row per --resample")
    args = parser.parse_args()
    model = Pipeline(args.checkpoint)
    judge = Judge(model.config)
    real = judge.held_out.images[: args.count]
    labels, half = judge.held_out.labels[: args.count].tolist(), real.shape[1] // 2
    mask = np.zeros(real.shape[1:3], bool)
    mask[half:] = True
    masked, mixed = real.copy(), real.copy()
    masked[:, half:] = 0
    mixed[:, half:] = model.sample(labels=labels, num_images=len(real), seed=1)[:, half:]
    found = {"real": real, "lower half blank": masked, "lower half of another sample": mixed}
    for resample in args.resample:
        made = model.sample(
            init_image=list(real), mask=mask, labels=labels, num_images=len(real), resample=resample
        )
        if (made[:, :half] != real[:, :half]).any():
            raise SystemExit("error: a pixel that is kept has changed")
        found[f"drawn anew, resample {resample}"] = made

    print("| lower half | read as the label | edge |\n| --- | --- | --- |")
    for name, images in found.items():
        accuracy = judge.scores(images, np.array(labels))["accuracy"]
        print(f"| {name} | {accuracy:.1%} | {edge(images, half) / edge(real, half):.2f} |", flush=True)
    if args.grid:
        rows = [images[:SHOWN] for images in found.values()]
        save_grid(pathlib.Path(args.grid), np.concatenate(rows))


if __name__ == "__main__":
    restart_with_huge_pages()  # as the commands do
    main()
