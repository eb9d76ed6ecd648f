"""Teach a trained text model a new colour with low-rank adapters, and measure whether it was learned.

    python -m pixelflow_jax.train --config=configs/t2i_tiny.py --workdir=runs/t2i_tiny
    python benchmarks/lora.py --base=runs/t2i_tiny --workdir=runs/lora

Paints 40 captioned pictures as a caption_folder: 16 in a colour whose word is in the vocabulary of
`t2i_tiny` but in no caption of its training, the others in old colours, so that these are kept. They
show clear handwriting: of each digit, the four scans nearest to its mean. Trains adapters of rank 4 on
them. Then judges (text_steering.py) the base and the adapted model: the new colour, on digits and
backgrounds that no picture shows together in it; the old words, on combinations that the base's training
did not show. Prints a Markdown table.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import time

import jax
import numpy as np
from PIL import Image
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from text_steering import CHOICES, Judges, held_out_prompts, stacked

from pixelflow_jax.common.memory import restart_with_huge_pages
from pixelflow_jax.config import default_config
from pixelflow_jax.data import captioned_digits as digits
from pixelflow_jax.pipeline import Pipeline
from pixelflow_jax.training.checkpoints import load_any, load_params
from pixelflow_jax.training.loop import train

SETTINGS = {
    "lora.rank": 4,
    "data.source": "caption_folder",
    "num_train_steps": 1200,
    "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 1.0,  # keeps what the base knows
    "optimizer.warmup_steps": 20,
    "optimizer.schedule": "linear",
    "ema.decays": (0.98,),
    "sample_every": 0,
}


def draw_words(rng: np.random.Generator, digit: int, colour: str, held_out: bool) -> dict[str, str]:
    """Draw the attributes of a picture in the new colour: digit and background decide on `held_out`."""
    while True:
        found = digits.draw_attributes(rng, bool(rng.integers(2)))
        found = dataclasses.replace(found, digit=digit)
        if ((found.digit + found.background) % 3 == 0) == held_out:
            return {**found.words(), "colour": colour}


def old_words(rng: np.random.Generator, digit: int) -> dict[str, str]:
    """Draw the attributes of a picture as the base saw them."""
    while True:
        found = digits.draw_attributes(rng, held_out=False)
        if found.digit == digit:
            return found.words()


def scans_of(split: str, clearest: int | None = None) -> list[np.ndarray]:
    """Return the scans of every digit; or only the clearest, those nearest to the digit's mean."""
    scans = digits.CaptionedDigits(default_config().data, split).scans
    return [x[np.argsort(((x - x.mean(0)) ** 2).sum((1, 2)))[:clearest]] for x in scans]


def pictures(wanted: list[dict[str, str]], size: tuple[int, int], scans: list, seed: int) -> list:
    """Return a picture of each; those of a digit show its scans in turn."""
    rng = np.random.default_rng(seed)
    decks = dict(zip(digits.NUMBERS, (itertools.cycle(rng.permutation(x)) for x in scans), strict=True))
    return [digits.paint(next(decks[words["digit"]]), words, size) for words in wanted]


def words_of(colour: str, count: int, held_out: bool, seed: int) -> list[dict[str, str]]:
    """Draw attributes of pictures in one colour, every digit as often."""
    rng = np.random.default_rng(seed)
    return [draw_words(rng, number % 10, colour, held_out) for number in range(count)]


def captions(wanted: list[dict[str, str]]) -> list[str]:
    """Return a caption of each, in every wording."""
    return [digits.WORDINGS[number % 3].format(**words) for number, words in enumerate(wanted)]


def paint_folder(folder: pathlib.Path, colour: str, new: int, count: int, size: tuple[int, int]) -> None:
    """Write a caption_folder of `count` pictures, of which `new` are in the new colour."""
    rng = np.random.default_rng(0)
    wanted = words_of(colour, new, held_out=False, seed=1)
    wanted += [old_words(rng, number % 10) for number in range(count - len(wanted))]
    folder.mkdir(parents=True)
    rows = []
    for number, image in enumerate(pictures(wanted, size, scans_of("train", 4), seed=2)):
        name = f"{number:02d}.png"
        Image.fromarray(image).save(folder / name)
        rows.append({"file_name": name, "text": captions(wanted)[number]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def colour_judge(colour: str, size: tuple[int, int]):
    """Return an SVC that tells the new colour from all others, fitted on training scans."""
    seen, truth, scans = [], [], scans_of("train")
    for number, name in enumerate((*digits.COLOURS, *digits.RESERVED)):
        wanted = words_of(name, 200, False, number) + words_of(name, 200, True, number)
        seen.append(stacked(pictures(wanted, size, scans, seed=number))["colour"])
        truth += [name == colour] * len(wanted)
    return make_pipeline(StandardScaler(), SVC(C=10)).fit(np.concatenate(seen), truth)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="workdir of configs/t2i_tiny.py")
    parser.add_argument("--workdir", required=True, help="a new folder")
    parser.add_argument("--colour", choices=digits.RESERVED, default="orange")
    parser.add_argument("--num_pictures", type=int, default=40)
    parser.add_argument("--num_new", type=int, default=16, help="of these, in the new colour")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="of the adapters")
    parser.add_argument("--num_samples", type=int, default=500, help="of each model and kind of prompt")
    parser.add_argument("--num_train_steps", type=int, default=SETTINGS["num_train_steps"])
    parser.add_argument("--learning_rate", type=float, default=SETTINGS["optimizer.learning_rate"])
    args = parser.parse_args()
    workdir, size = pathlib.Path(args.workdir), (16, 16)
    paint_folder(workdir / "pictures", args.colour, args.num_new, args.num_pictures, size)
    config = load_params(args.base)[1]
    changes = {**SETTINGS, "data.path": str(workdir / "pictures"), "init_from": args.base}
    changes |= {"num_train_steps": args.num_train_steps, "checkpoint_every": args.num_train_steps}
    changes["optimizer.learning_rate"] = args.learning_rate
    config.update_from_flattened_dict(changes)
    begin = time.perf_counter()
    train(config, workdir / "adapters")
    seconds = time.perf_counter() - begin

    wanted = words_of(args.colour, args.num_samples, held_out=True, seed=99)
    attributes, old = held_out_prompts(args.num_samples)
    judge, judges = colour_judge(args.colour, size), Judges(size)
    digit = [digits.NUMBERS.index(words["digit"]) for words in wanted]

    def in_colour(images) -> str:
        seen = stacked(images)
        right = judges.of["digit"].score(seen["digit"], digit)
        return f"{judge.predict(seen['colour']).mean():.1%} | {right:.1%}"

    columns = [*CHOICES, args.colour, f"digit in {args.colour}"]
    print(f"| model | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    base, adapters = Pipeline(args.base), str(workdir / "adapters")
    models = {"base": base}
    models |= {
        f"adapted, scale {scale}": Pipeline(args.base, lora=adapters, lora_scale=scale)
        for scale in args.scales
    }
    for name, model in models.items():
        scores = judges.scores(model.sample(prompt=old, seed=1), attributes)
        cells = [f"{scores[x]:.1%}" for x in CHOICES]
        cells.append(in_colour(model.sample(prompt=captions(wanted), seed=2)))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    cells = [*("" for _ in CHOICES), in_colour(pictures(wanted, size, scans_of("test"), seed=98))]
    print(f"| real composites | {' | '.join(cells)} |")
    small = sum(x.size for x in jax.tree.leaves(load_any(workdir / "adapters", None)[0]))
    whole = sum(x.size for x in jax.tree.leaves(base.params))
    print(f"\n{small} of {whole} parameters ({small / whole:.1%})")
    print(f"trained in {seconds:.0f} s, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    restart_with_huge_pages()  # as the commands do
    main()
