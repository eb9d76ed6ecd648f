"""Makes the pictures of the README and of docs/method.md from a trained default model.

    python docs/pictures.py --checkpoint=runs/digits

The others say in their documents which command made them (benchmarks/text_steering.py --grid,
benchmarks/quality.py, tests/test_demo.py).
"""

import argparse
import dataclasses
import functools
import pathlib

import jax
import numpy as np

from pixelflow_jax import images
from pixelflow_jax.pipeline import Pipeline
from pixelflow_jax.sampling.generate import GAP, GREY, build_sampler, save_png
from pixelflow_jax.sampling.sampler import Noise, class_conditions
from pixelflow_jax.sampling.starts import image_keys

HERE = pathlib.Path(__file__).resolve().parent
SIDE = 64  # pixels that every image of a picture is enlarged to


def board(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Rows of small uint8 images as one picture, each pixel a square; None leaves a gap."""
    lines = []
    for row in rows:
        parts = []
        for image in row:
            image = np.full((1, 1, 3), GREY, np.uint8) if image is None else np.asarray(image)
            scale = SIDE // image.shape[0]
            image = image.repeat(scale, axis=0).repeat(scale, axis=1)
            parts.append(np.pad(image, ((0, GAP), (0, GAP), (0, 0)), constant_values=GREY))
        lines.append(np.concatenate(parts, axis=1))
    return np.concatenate(lines, axis=0)[:-GAP, :-GAP]


def samples(model: Pipeline) -> np.ndarray:
    """Ten of each class, a column each."""
    made = model.sample(num_images=100)
    return board([list(made[i : i + 10]) for i in range(0, 100, 10)])


def cascade(model: Pipeline, labels=(2, 5, 8), at=(0.0, 0.33, 0.66, 1.0)) -> np.ndarray:
    """A row an image: x at these tau of every stage, from noise to the sample."""
    sampler = build_sampler(model.config)
    conditions = class_conditions(np.array(labels, np.int32), model.config.model.num_classes)
    noise = sampler.draw_noise(image_keys(0, np.arange(len(labels))))
    rows, x = [[] for _ in labels], noise.start
    for stage in range(sampler.cascade.num_stages):
        if stage:
            x = sampler.step_up(stage, x, noise.blocks[stage - 1])
        grid = sampler.stage_grid(stage)
        for begin, end in zip((None, *at[:-1]), at, strict=True):
            if begin is not None:
                part = dataclasses.replace(grid, taus=tuple(np.linspace(begin, end, 11).tolist()))
                x, _ = solve(model, sampler, stage, part, x, conditions)
            for row, image in zip(rows, images.to_uint8(x), strict=True):
                row.append(image)
        if stage < sampler.cascade.num_stages - 1:
            for row in rows:
                row.append(None)
    return board(rows)


def solve(model, sampler, stage, grid, x, conditions):
    """Follows the velocity over a grid of one stage."""
    call = functools.partial(sampler.solve_stage, model.params, stage)
    return jax.jit(lambda x: call(x, grid, *conditions))(x)


def renoising(model: Pipeline, labels=tuple(range(10))) -> np.ndarray:
    """Three rows: with block noise between stages; with white noise of the same size; with none."""
    sampler = build_sampler(model.config)
    conditions = class_conditions(np.array(labels, np.int32), model.config.model.num_classes)
    noise = sampler.draw_noise(image_keys(0, np.arange(len(labels))))
    white = [jax.random.normal(jax.random.key(s), b.shape) for s, b in enumerate(noise.blocks)]
    rows = []
    for blocks in (noise.blocks, white, [0 * block for block in noise.blocks]):
        ends = jax.jit(sampler.sample)(model.params, Noise(noise.start, blocks), *conditions)
        rows.append(list(images.to_uint8(ends[-1])))
    return board(rows)


def guidance(model: Pipeline, scales=(1.0, 1.2, 2.0, 4.0, 8.0)) -> np.ndarray:
    """A row for each guidance scale, a column a class, from the same noise."""
    rows = [model.sample(num_images=10, guidance_scale=scale) for scale in scales]
    return board([list(row) for row in rows])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="workdir of configs/digits.py")
    parser.add_argument("--out", default=str(HERE), help="folder to write (default: %(default)s)")
    args = parser.parse_args()
    model = Pipeline(args.checkpoint)
    for make in (samples, cascade, renoising, guidance):
        path = pathlib.Path(args.out) / f"{make.__name__}.png"
        save_png(path, make(model))
        print(path)


if __name__ == "__main__":
    main()
