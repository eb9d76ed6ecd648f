"""Compare ways to a model with larger patches in its last stage: from a trained one, and from scratch.

    apt-get install dataset-fashion-mnist
    python -m pixelflow_jax.train --config=configs/fashion_p2.py --workdir=runs/fashion_p2 \\
        --config.keep_every=400
    python benchmarks/patches.py --teacher=runs/fashion_p2 --workdir=runs/patches

Fine-tunes the teacher's weights to patches of (2, 2, 4) for a tenth of its steps, from several seeds,
and trains the same model from scratch for as many steps as the teacher had. Samples of each, at several
steps, are judged as in quality.py, and so are the teacher's. The samplers are timed in turn on all
cores. Prints a Markdown table; what the folders hold already is not trained or judged again. On two
cores this takes two hours, beside the teacher's training.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from quality import Judge, draw

from pixelflow_jax.common.memory import restart_with_huge_pages
from pixelflow_jax.sampling.generate import build_sampler, make_generate, save_grid
from pixelflow_jax.sampling.sampler import class_conditions
from pixelflow_jax.sampling.starts import FromSeed
from pixelflow_jax.training.checkpoints import load_params
from pixelflow_jax.training.loop import train

BATCH = 100  # images per call of the sampler in timings
POINTS = (0.1, 0.25, 0.5, 1.0)  # parts of a run that are judged
FINE_TUNING = {  # twice the batch: a step then costs four fifths of the teacher's
    "batch_size": 96,
    "optimizer.name": "muon",
    "optimizer.muon_learning_rate": 4e-2,
    "optimizer.learning_rate": 2e-3,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 10,
    "ema.decays": (0.97,),
}


class Run:
    """A run that was trained: its steps, and the seconds that training took up to them."""

    def __init__(self, folder: pathlib.Path, before: float = 0.0):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        self.folder, self.before, self.lines = folder, before, list(lines)
        self.config = load_params(folder)[1]
        rate = statistics.median(line["images_per_s"] for line in self.lines)
        self.step_seconds = self.config.batch_size / rate

    def kept(self, point: float) -> int:
        """Return the step of the checkpoint nearest to a part of the run."""
        steps = [int(x.name) for x in (self.folder / "checkpoints").iterdir() if x.name.isdigit()]
        return min(steps, key=lambda step: abs(step - point * self.config.num_train_steps))

    def loss(self, step: int) -> float:
        """Return the last stage's loss: the mean of a twentieth of the run up to a step."""
        first = step - self.config.num_train_steps / 20
        near = [x["loss_per_stage"][-1] for x in self.lines if first < x["step"] <= step]
        return statistics.mean(near)

    def seconds(self, step: int) -> float:
        """Return the seconds of training up to a step, those of the weights it began from included."""
        return self.before + step * self.step_seconds


def trained(base: Run, folder: pathlib.Path, steps: int, changes: dict, before: float = 0.0) -> Run:
    """Train the base's config with changes, unless that is done; keep checkpoints for POINTS."""
    every = max(int(steps * min(POINTS) / 2), 1)
    kept = {"checkpoint_every": every, "keep_every": every, "log_every": 10, "sample_every": 0}
    config = base.config.copy_and_resolve_references()
    with config.ignore_type():  # patch_size may be a number or a tuple
        config.update_from_flattened_dict({**kept, "num_train_steps": steps, **changes})
    train(config, folder)
    return Run(folder, before)


def sampling_seconds(folders: dict[str, pathlib.Path], runs: int = 3) -> dict[str, float]:
    """Return seconds per image of each run's sampler: medians of calls in turn."""
    calls, start, index = {}, FromSeed(0), np.arange(BATCH)
    conditions = class_conditions((index % 10).astype(np.int32), 10)
    for name, folder in folders.items():
        params, config, _ = load_params(folder)
        calls[name] = (make_generate(build_sampler(config), start), params)
    found = {name: [] for name in folders}
    for number in range(runs + 1):  # the first compiles
        for name, (generate, params) in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(generate(params, start.inputs(index), *conditions))
            if number:
                found[name].append((time.perf_counter() - begin) / BATCH)
    return {name: statistics.median(times) for name, times in found.items()}


class Table:
    """Rows of what was judged, printed as they come."""

    def __init__(self, config: ConfigDict, count: int):
        self.judge, self.count = Judge(config), count
        print("| run | steps | minutes | loss of the last stage | accuracy | Frechet ratio | nearest |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)

    def row(self, name: str, run: Run, point: float) -> dict[str, float]:
        """Judge a run at a part of its steps."""
        step = run.kept(point)
        judged = run.folder / f"quality_{step}_{self.count}.json"
        if not judged.exists():
            images, labels, _ = draw(str(run.folder / "checkpoints" / str(step)), self.count)
            save_grid(judged.with_suffix(".png"), images[:100])
            judged.write_text(json.dumps(self.judge.scores(images, labels)))
        scores = json.loads(judged.read_text())
        said = "{accuracy:.1%} | {frechet:.1f} | {nearest:.2f}".format(**scores)
        spent = f"{run.seconds(step) / 60:.1f} | {run.loss(step):.4f}"
        print(f"| {name} | {step} | {spent} | {said} |", flush=True)
        return scores


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="workdir of configs/fashion_p2.py")
    parser.add_argument("--workdir", required=True, help="where to train")
    parser.add_argument("--patch_size", type=int, nargs="+", default=[2, 2, 4])
    parser.add_argument("--seeds", type=int, default=3, help="of the fine-tuning, from 0 on")
    parser.add_argument("--num_samples", type=int, default=1000, help="of models trained to the end")
    parser.add_argument("--num_between", type=int, default=250, help="samples at the steps between")
    args = parser.parse_args()
    teacher, workdir = Run(pathlib.Path(args.teacher)), pathlib.Path(args.workdir)
    steps = teacher.config.num_train_steps
    larger = {"model.patch_size": tuple(args.patch_size)}
    start = {**larger, **FINE_TUNING, "init_from": args.teacher}
    tenth, before = max(steps // 10, 1), teacher.seconds(steps)
    warm = [
        trained(teacher, workdir / f"warm{seed}", tenth, {**start, "seed": seed}, before)
        for seed in range(args.seeds)
    ]
    scratch = trained(teacher, workdir / "scratch", steps, larger)

    table = Table(teacher.config, args.num_samples)
    first = table.row("patch 2", teacher, 1)
    ends = [table.row(f"warm start, seed {seed}", run, 1) for seed, run in enumerate(warm)]
    table.row("from scratch", scratch, 1)
    table.count = args.num_between
    for point in POINTS[:-1]:
        for name, run in (("warm start", warm[0]), ("from scratch", scratch), ("patch 2", teacher)):
            table.row(f"{name}, {table.count} samples", run, point)
    accuracy = statistics.median(end["accuracy"] for end in ends) - first["accuracy"]
    ratio = statistics.median(end["frechet"] for end in ends) / first["frechet"]
    seconds = sampling_seconds({"patch 2": teacher.folder, "larger": warm[0].folder})
    print(
        f"\nheld-out real images: accuracy {table.judge.real_accuracy:.1%}; medians of the warm starts: "
        f"accuracy {100 * accuracy:+.1f} points, Frechet ratio {ratio:.2f} times patch 2's; ms per "
        f"sample {1e3 * seconds['larger']:.0f} against {1e3 * seconds['patch 2']:.0f}, "
        f"{seconds['larger'] / seconds['patch 2']:.2f} times, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    restart_with_huge_pages()  # as the commands do
    main()
