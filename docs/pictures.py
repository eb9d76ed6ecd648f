"""Make the pictures for the README, docs/method.md and docs/first_hour.md from trained models.

    python docs/pictures.py --checkpoint=runs/emoji              emoji.png, cascade.png
    python docs/pictures.py --checkpoint=runs/digits             samples.png, renoising.png, guidance.png
    python docs/pictures.py --checkpoint=runs/digits --browser   and demo.png; extras demo, browser, test

`python benchmarks/text_steering.py --checkpoint=runs/t2i_tiny --grid=docs/t2i_tiny.png` makes
t2i_tiny.png. fashion.png is the quality.png that `python benchmarks/quality.py
--config=configs/fashion.py` writes.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.paths import stage_ends
from pixelflow_jax.data.sources import load_source
from pixelflow_jax.models.conditioning import encode_text
from pixelflow_jax.pipeline import Pipeline
from pixelflow_jax.sampling.generate import GAP, GREY, build_sampler, save_png
from pixelflow_jax.sampling.starts import image_keys
from pixelflow_jax.text.encoder import make_text_reader

HERE = pathlib.Path(__file__).resolve().parent
SIDE = 64  # pixels per side of every enlarged image
PROMPTS = HERE / "emoji.txt"
SHOWN = ("red apple", "globe showing europe africa", "jack o lantern")  # in cascade.png


def board(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Arrange rows of small uint8 images in one picture, each pixel a square; None leaves a gap."""
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
    """Draw ten samples per class, one class per column."""
    made = model.sample(num_images=100)
    return board([list(made[i : i + 10]) for i in range(0, 100, 10)])


def emoji(model: Pipeline) -> np.ndarray:
    """Draw one sample per prompt of emoji.txt, six in a row."""
    prompts = PROMPTS.read_text().split("\n")[:-1]
    made = model.sample(prompt=prompts, num_images=len(prompts))
    return board([list(made[i : i + 6]) for i in range(0, len(made), 6)])


def cascade(model: Pipeline, wanted=SHOWN, at=(0.0, 0.33, 0.66, 1.0)) -> np.ndarray:
    """Draw one image per row, of these prompts: x at these tau of every stage."""
    sampler, read = build_sampler(model.config), make_text_reader(model.config)
    texts = read(wanted), read([""] * len(wanted))
    conditions = [encode_text(sampler.model, model.params, text) for text in texts]
    noise = sampler.draw_noise(image_keys(0, np.arange(len(wanted))))
    rows, x = [[] for _ in wanted], noise.start
    for stage in range(sampler.cascade.num_stages):
        if stage:
            x = sampler.step_up(stage, x, noise.blocks[stage - 1])
        grid = sampler.stage_grid(stage)
        for begin, end in zip((None, *at[:-1]), at, strict=True):
            if begin is not None:
                part = dataclasses.replace(grid, taus=tuple(np.linspace(begin, end, 11).tolist()))
                x, _ = solve(model, sampler, part, x, conditions)
            for row, image in zip(rows, images.to_uint8(x), strict=True):
                row.append(image)
        if stage < sampler.cascade.num_stages - 1:
            for row in rows:
                row.append(None)
    return board(rows)


def solve(model, sampler, grid, x, conditions):
    """Integrate the velocity over a grid of one stage."""
    call = functools.partial(sampler.solve_stage, model.params)
    return jax.jit(lambda x: call(x, grid, *conditions))(x)


def renoising(model: Pipeline, count: int = 10) -> np.ndarray:
    """Draw starts of the second stage: as in training; stepped up with block noise; without it."""
    sampler, source = build_sampler(model.config), load_source(model.config)
    cascade, keys = sampler.cascade, image_keys(0, np.arange(count))
    clean = images.from_uint8(source.images[:count])
    noise = sampler.draw_noise(keys)
    fine = jax.random.normal(jax.random.key(1), clean.shape)
    trained, _ = stage_ends(cascade, 1, clean, fine)
    _, before = stage_ends(cascade, 0, clean, noise.start)
    stepped = [sampler.step_up(1, before, scale * noise.blocks[0]) for scale in (1, 0)]
    return board([list(images.to_uint8(x)) for x in (trained, *stepped)])


def guidance(model: Pipeline, scales=(1.0, 1.2, 2.0, 4.0, 8.0)) -> np.ndarray:
    """Draw one guidance scale per row and one class per column, from the same noise."""
    rows = [model.sample(num_images=10, guidance_scale=scale) for scale in scales]
    return board([list(row) for row in rows])


def demo_page(checkpoint: str, out: pathlib.Path) -> None:
    """Take a screenshot of the demo in headless Chromium, after two images."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import test_demo

    with tempfile.TemporaryDirectory() as folder, test_demo.running(checkpoint) as url:
        browser = test_demo.open_browser(pathlib.Path(folder))
        try:
            browser.get(url)
            for label, solver in (("3", "euler"), ("8", "heun")):
                test_demo.choose(browser, "class", label)
                test_demo.choose(browser, "solver", solver)
                test_demo.generate(browser)
            time.sleep(2)  # images fade in
            browser.save_screenshot(str(out))
        finally:
            browser.quit()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="workdir of digits, or of emoji")
    parser.add_argument("--out", default=str(HERE), help="folder to write (default: %(default)s)")
    parser.add_argument("--browser", action="store_true", help="also make demo.png")
    args = parser.parse_args()
    model = Pipeline(args.checkpoint)
    makers = (samples, renoising, guidance) if model.config.model.num_classes else (emoji, cascade)
    for make in makers:
        path = pathlib.Path(args.out) / f"{make.__name__}.png"
        save_png(path, make(model))
        print(path)
    if args.browser:
        demo_page(args.checkpoint, pathlib.Path(args.out) / "demo.png")


if __name__ == "__main__":
    main()
