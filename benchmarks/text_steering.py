"""Measure whether words steer the images: judge a text model on unseen attribute combinations.

    python benchmarks/text_steering.py --checkpoint=runs/t2i_tiny

Prompts are captions from the split "test" of captioned_digits: combinations of digit, colour and
background that training never showed. Each attribute has a judge, an SVC on simple features (see
`features`), fitted only on real composites of the training scans. For each attribute, the table shows
the share of samples in which the judge finds what the prompt said, the same for real composites of
held-out scans, and chance.
"""

import argparse

import jax
import numpy as np
from PIL import Image, ImageDraw
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from pixelflow_jax.config import default_config
from pixelflow_jax.data import captioned_digits as digits
from pixelflow_jax.sampling.generate import build_sampler, make_generate
from pixelflow_jax.sampling.starts import FromSeed
from pixelflow_jax.text.encoder import make_tokenizer
from pixelflow_jax.training.checkpoints import load_params

CHOICES = dict(
    digit=digits.NUMBERS,
    colour=digits.COLOURS,
    background=digits.BACKGROUNDS,
    size=digits.SIZES,
    place=digits.PLACES,
)


def features(picture: np.ndarray) -> dict[str, np.ndarray]:
    """Return each judge's input: colours, the box around the ink, its centre, and the ink in the box."""
    x = picture.astype(float)
    border = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(x - background, axis=-1)
    ink = distance / max(distance.max(), 1)
    rows, columns = (np.flatnonzero((ink > 0.4).any(axis)) for axis in (1, 0))
    if not len(rows):  # a single colour everywhere
        rows, columns = (np.arange(side) for side in x.shape[:2])
        ink = np.ones(x.shape[:2])
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    strongest = x[ink > 0.8]
    box = Image.fromarray((255 * ink[top:bottom, left:right]).astype(np.uint8)).resize((12, 12))
    return {
        "digit": np.asarray(box).ravel() / 255,
        "colour": strongest.mean(axis=0),
        "background": background,
        "size": np.array([bottom - top, right - left]),
        "place": np.array([(top + bottom) / 2, (left + right) / 2]),
    }


def stacked(pictures) -> dict[str, np.ndarray]:
    """Return the stacked features of many images."""
    found = [features(picture) for picture in pictures]
    return {name: np.stack([f[name] for f in found]) for name in CHOICES}


def composites(split: str, count: int, size: tuple[int, int], held_out: bool | None = None):
    """Return (images, attributes) of real scans; `held_out=None` alternates both combinations."""
    source = digits.CaptionedDigits(default_config().data, split)
    pictures, attributes = [], []
    for index in range(count):
        rng = np.random.default_rng((7, index))
        found = digits.draw_attributes(rng, bool(index % 2) if held_out is None else held_out)
        scans = source.scans[found.digit]
        pictures.append(digits.paint(scans[rng.integers(len(scans))], found.words(), size))
        attributes.append(found)
    return np.stack(pictures), attributes


class Judges:
    """One SVC per attribute (`of`), fitted on real composites of the training scans."""

    def __init__(self, size: tuple[int, int], count: int = 4000):
        pictures, attributes = composites("train", count, size)
        seen = stacked(pictures)
        self.of = {}
        for name in CHOICES:
            truth = [getattr(a, name) for a in attributes]
            self.of[name] = make_pipeline(StandardScaler(), SVC(C=10)).fit(seen[name], truth)

    def scores(self, pictures, attributes) -> dict[str, float]:
        """Return the share of images in which each judge finds the attribute."""
        seen = stacked(pictures)
        return {
            name: float(judge.score(seen[name], [getattr(a, name) for a in attributes]))
            for name, judge in self.of.items()
        }


def held_out_prompts(count: int) -> tuple[list, list[str]]:
    """Return (attributes, captions) of combinations that training never showed."""
    rng = np.random.default_rng(1)
    wanted = [digits.draw_attributes(rng, held_out=True) for _ in range(count)]
    return wanted, [a.captions()[i % len(digits.WORDINGS)] for i, a in enumerate(wanted)]


def draw(checkpoint: str, prompts: list[str], scale: float | None, size=(None, None), batch: int = 100):
    """Return (one image per prompt, config); `scale` and `size` override those of the config."""
    params, config, _ = load_params(checkpoint)
    if scale is not None:
        config.sample.guidance_scale = scale
    start, parts = FromSeed(1000), []
    generate = make_generate(build_sampler(config, *size), start)
    tokenize, length = make_tokenizer(config), config.text.max_length
    null = tokenize([""] * batch, length).condition()
    for begin in range(0, len(prompts), batch):
        index = np.arange(begin, begin + batch) % len(prompts)
        condition = tokenize([prompts[i] for i in index], length).condition()
        made = generate(params, start.inputs(np.arange(begin, begin + batch)), condition, null)
        parts.append(jax.device_get(made.pixels))
    return np.concatenate(parts)[: len(prompts)], config


def captioned_grid(path: str, pictures, prompts, columns: int = 4, side: int = 192) -> None:
    """Write a grid of images with the prompt below each."""
    rows = -(-len(prompts) // columns)
    canvas = Image.new("RGB", (columns * (side + 12), rows * (side + 48)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = (number % columns) * (side + 12) + 6, (number // columns) * (side + 48) + 4
        shown = Image.fromarray(picture)
        scale = side / max(shown.size)
        shown = shown.resize(tuple(round(scale * n) for n in shown.size), Image.NEAREST)
        canvas.paste(shown, (x, y + side - shown.height))
        lines, line = [], ""
        for word in prompt.split():
            if len(line) + len(word) > 30:
                lines, line = [*lines, line], ""
            line = f"{line} {word}".strip()
        pen.multiline_text((x, y + side + 2), "\n".join([*lines, line]), fill="black")
    canvas.save(path)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--guidance_scales", type=float, nargs="+", help="default: from the config")
    parser.add_argument("--height", type=int, help="default: the trained size")
    parser.add_argument("--width", type=int, help="default: the trained size")
    parser.add_argument("--grid", help="PNG file to write, with 12 samples and their prompts")
    args = parser.parse_args()
    wanted, prompts = held_out_prompts(args.num_samples)
    judges = None
    for scale in args.guidance_scales or [None]:
        pictures, config = draw(args.checkpoint, prompts, scale, (args.height, args.width))
        if judges is None:
            size = pictures.shape[1:3]
            judges = Judges(size)
            real = judges.scores(*composites("test", 1000, size, held_out=True))
        found = judges.scores(pictures, wanted)
        print(
            f"\nguidance {config.sample.guidance_scale}, {len(prompts)} prompts, held-out combinations, "
            f"{size[0]}x{size[1]}\n"
        )
        print("| attribute | samples | real composites | chance |\n| --- | --- | --- | --- |")
        for name, choices in CHOICES.items():
            print(f"| {name} | {found[name]:.1%} | {real[name]:.1%} | {1 / len(choices):.0%} |")
    if args.grid:
        captioned_grid(args.grid, pictures[:12], prompts[:12])


if __name__ == "__main__":
    main()
