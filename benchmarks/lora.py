"""Teach a trained text model a new colour with low-rank adapters, and measure whether it was learned.

    python -m pixelflow_jax.train --config=configs/t2i_tiny.py --workdir=runs/t2i_tiny
    python benchmarks/lora.py --base=runs/t2i_tiny --workdir=runs/lora

Paints 40 captioned pictures as a caption_folder: half in a colour whose word is in the vocabulary of
`t2i_tiny` but in no caption of its training, half in old colours, so that they are kept. Trains adapters
of rank 4 on them. Then judges (text_steering.py) the base and the adapted model: the new colour, on
combinations of digit and background that none of the 40 shows; the old words, on those that the base's
training did not show. Prints Markdown tables.
"""

import argparse
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
from text_steering import CHOICES, Judges, composites, features, held_out_prompts

from pixelflow_jax.common.memory import restart_with_huge_pages
from pixelflow_jax.config import default_config
from pixelflow_jax.data import captioned_digits as digits
from pixelflow_jax.pipeline import Pipeline
from pixelflow_jax.training.checkpoints import load_any, load_params
from pixelflow_jax.training.loop import train

SETTINGS = {
    "lora.rank": 4,
    "data.source": "caption_folder",
    "num_train_steps": 600,
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 20,
    "optimizer.schedule": "linear",
    "ema.decays": (0.98,),
    "data.label_dropout": 0.0,
    "sample_every": 0,
}


def draw_words(rng: np.random.Generator, colour: str, held_out: bool) -> dict[str, str]:
    """Draw the attributes of a picture in the new colour: digit and background decide on `held_out`."""
    while True:
        found = digits.draw_attributes(rng, bool(rng.integers(2)))
        if ((found.digit + found.background) % 3 == 0) == held_out:
            return {**found.words(), "colour": colour}


def pictures(colour: str, count: int, size: tuple[int, int], held_out: bool, split: str, seed: int):
    """Return (images, attributes of each) in one colour, from scans of a split."""
    source = digits.CaptionedDigits(default_config().data, split)
    rng, images, wanted = np.random.default_rng(seed), [], []
    for _ in range(count):
        wanted.append(draw_words(rng, colour, held_out))
        scans = source.scans[digits.NUMBERS.index(wanted[-1]["digit"])]
        images.append(digits.paint(scans[rng.integers(len(scans))], wanted[-1], size))
    return images, wanted


def paint_folder(folder: pathlib.Path, colour: str, count: int, size: tuple[int, int]) -> None:
    """Write a caption_folder: half of the pictures in the new colour, half in the old ones."""
    images, wanted = pictures(colour, count // 2, size, held_out=False, split="train", seed=0)
    old, attributes = composites("train", count - len(images), size, held_out=False)
    wanted += [a.words() for a in attributes]
    rows = []
    folder.mkdir(parents=True)
    for number, (image, words) in enumerate(zip([*images, *old], wanted, strict=True)):
        name = f"{number:02d}.png"
        Image.fromarray(image).save(folder / name)
        rows.append({"file_name": name, "text": digits.WORDINGS[number % 3].format(**words)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def colour_judge(colour: str, size: tuple[int, int]):
    """Return an SVC that tells the new colour from all others, fitted on training scans."""
    seen, truth = [], []
    for number, name in enumerate((*digits.COLOURS, *digits.RESERVED)):
        images, _ = pictures(name, 400, size, held_out=bool(number % 2), split="train", seed=number + 1)
        seen += [features(image)["colour"] for image in images]
        truth += [name == colour] * len(images)
    return make_pipeline(StandardScaler(), SVC(C=10)).fit(np.stack(seen), truth)


def share_of(judge, images) -> float:
    """Return the share of images in which the judge finds the new colour."""
    return float(judge.predict(np.stack([features(image)["colour"] for image in images])).mean())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="workdir of configs/t2i_tiny.py")
    parser.add_argument("--workdir", required=True, help="a new folder")
    parser.add_argument("--colour", choices=digits.RESERVED, default="orange")
    parser.add_argument("--num_pictures", type=int, default=40)
    parser.add_argument("--num_samples", type=int, default=500, help="of each model and kind of prompt")
    parser.add_argument("--num_train_steps", type=int, default=SETTINGS["num_train_steps"])
    args = parser.parse_args()
    workdir, size = pathlib.Path(args.workdir), (16, 16)
    paint_folder(workdir / "pictures", args.colour, args.num_pictures, size)
    config = load_params(args.base)[1]
    changes = {**SETTINGS, "data.path": str(workdir / "pictures"), "init_from": args.base}
    changes |= {"num_train_steps": args.num_train_steps, "checkpoint_every": args.num_train_steps}
    config.update_from_flattened_dict(changes)
    begin = time.perf_counter()
    train(config, workdir / "adapters")
    seconds = time.perf_counter() - begin

    _, wanted = pictures(args.colour, args.num_samples, size, held_out=True, split="test", seed=99)
    prompts = [digits.WORDINGS[i % 3].format(**words) for i, words in enumerate(wanted)]
    attributes, old = held_out_prompts(args.num_samples)
    judge, judges = colour_judge(args.colour, size), Judges(size)
    real, _ = pictures(args.colour, args.num_samples, size, held_out=True, split="test", seed=98)
    print(f"| prompts | {' | '.join(CHOICES)} |\n|{' --- |' * (len(CHOICES) + 1)}")
    models = {
        "base": Pipeline(args.base),
        "adapted": Pipeline(args.base, lora=str(workdir / "adapters")),
    }
    found = {"real composites": share_of(judge, real)}
    for name, model in models.items():
        scores = judges.scores(model.sample(prompt=old, seed=1), attributes)
        print(f"| old words, {name} | " + " | ".join(f"{scores[x]:.1%}" for x in CHOICES) + " |")
        found[name] = share_of(judge, model.sample(prompt=prompts, seed=2))
    share = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
    small = sum(x.size for x in jax.tree.leaves(load_any(workdir / "adapters", None)[0]))
    whole = sum(x.size for x in jax.tree.leaves(models["base"].params))
    print(
        f"\n{args.colour} in {args.num_samples} unseen combinations: {share}; {small} of {whole} "
        f"parameters ({small / whole:.1%}); {seconds:.0f} s, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    restart_with_huge_pages()  # as the commands do
    main()
