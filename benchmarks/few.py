"""Compare students with their teachers: quality by network calls, distance to the teacher, images/s.

    PYTHONPATH=benchmarks python benchmarks/few.py --students runs/digits_few [--others runs/longer]

Each student is judged with 1, 2 and 4 calls of the network per stage and as its config says; its teacher
(config.distill.teacher) with as many calls by each solver, where a guided evaluation counts as two, and
with its config's number of steps. Class models are judged as in quality.py, text models as in
text_steering.py. "Distance" is the rms over images in [-1, 1] from what the teacher's flow gives for the
same noise (32 midpoint steps per stage). With several students the numbers are medians. The speed is
that of the compiled samplers at batch 100, in turn, beside the load of the machine.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np
import quality
import text_steering
from ml_collections import ConfigDict

from pixelflow_jax.common.memory import restart_with_huge_pages
from pixelflow_jax.sampling.generate import build_sampler, make_generate
from pixelflow_jax.sampling.sampler import class_conditions
from pixelflow_jax.sampling.starts import FromSeed
from pixelflow_jax.text.encoder import make_text_reader
from pixelflow_jax.training.checkpoints import load_params

BATCH = 100


class Classes:
    """What class models are asked for, and their judge."""

    def __init__(self, config: ConfigDict, count: int):
        self.judge, self.classes = quality.Judge(config), config.model.num_classes
        self.labels = np.arange(count, dtype=np.int32) % self.classes

    def conditions(self, index):
        """Return (condition, null condition) of these images."""
        return class_conditions(self.labels[index], self.classes)

    def scores(self, pixels) -> dict[str, float]:
        """Return each metric of all images."""
        return self.judge.scores(pixels, self.labels)


class Texts:
    """What text models are asked for: unseen combinations, and their judges."""

    def __init__(self, config: ConfigDict, count: int):
        self.read = make_text_reader(config)
        self.wanted, self.prompts = text_steering.held_out_prompts(count)
        self.judges = text_steering.Judges((config.data.resolution,) * 2)

    def conditions(self, index):
        """Return (condition, null condition) of these images."""
        return self.read([self.prompts[i] for i in index]), self.read([""] * len(index))

    def scores(self, pixels) -> dict[str, float]:
        """Return the share of images with each attribute right."""
        return self.judges.scores(pixels, self.wanted)


class Model:
    """A checkpoint; samplers are its config's, with changes."""

    def __init__(self, path: str):
        self.path = path
        self.params, self.config, _ = load_params(path)

    def generate(self, **changes):
        """Return (start, compiled sampler)."""
        config = self.config.copy_and_resolve_references()
        for name, value in changes.items():
            config.sample[name] = value
        start = FromSeed(1000)
        return start, make_generate(build_sampler(config), start)

    def draw(self, asked, count: int, **changes):
        """Return uint8 images of all that is asked, and the mean number of evaluations."""
        (start, generate), parts = self.generate(**changes), []
        for begin in range(0, count, BATCH):
            index = np.arange(begin, begin + BATCH)
            out = generate(self.params, start.inputs(index), *asked.conditions(index % count))
            parts.append(jax.device_get((out.pixels, out.nfe)))
        pixels, nfe = map(np.concatenate, zip(*parts, strict=True))
        return pixels[:count], float(nfe.sum(axis=1).mean())


def teacher_rows(config: ConfigDict, calls: int) -> dict[str, dict]:
    """Return the settings of the solvers that take at most `calls` network calls per stage."""
    if calls == 1:
        return {"euler, 1 step, no guidance": dict(solver="euler", num_steps=(1,), guidance_scale=0.0)}
    rows = {}
    for solver, each in (("euler", 2), ("ab2", 2), ("midpoint", 4)):
        if steps := calls // each:
            rows[f"{solver}, {steps} steps"] = dict(solver=solver, num_steps=(steps,))
    return rows


def rows_of(
    path: str, others: list[str], count: int
) -> tuple[dict[str, dict[str, float]], Model, Model]:
    """Return ({row: {metric: value}}, student, teacher) of one student."""
    student = Model(path)
    teacher = Model(student.config.distill.teacher)
    asked = (Classes if student.config.model.num_classes else Texts)(teacher.config, count)
    flow, _ = teacher.draw(asked, count, solver="midpoint", num_steps=(32,))

    def row(model, **changes):
        pixels, evaluations = model.draw(asked, count, **changes)
        gap = pixels.astype(np.float32) - flow
        distance = float(np.sqrt(np.square(gap / 127.5).mean()))
        guided = bool(changes.get("guidance_scale", model.config.sample.guidance_scale))
        return {"calls": evaluations * (1 + guided), **asked.scores(pixels), "distance": distance}

    own, theirs = student.config.sample.num_steps, teacher.config.sample.num_steps
    rows = {}
    for calls in (1, 2, 4):
        for name, settings in teacher_rows(teacher.config, calls).items():
            rows[f"teacher, {name}"] = row(teacher, **settings)
        rows[f"student, {calls}"] = row(student, num_steps=(calls,))
    if len(own) > 1:
        rows[f"student, {'-'.join(map(str, own))}"] = row(student)
    rows["teacher, as its config says"] = row(teacher)
    rows[f"teacher, midpoint, {theirs[0]} steps"] = row(teacher, solver="midpoint")
    for other in others:
        rows["other, euler, 1 steps"] = row(Model(other), solver="euler", num_steps=(1,))
        rows["other, as its config says"] = row(Model(other))
    return rows, student, teacher


def speeds(student: Model, teacher: Model, rounds: int) -> dict[str, float]:
    """Return images per second at batch 100 of the configs' samplers, medians of alternating runs."""
    asked = (Classes if student.config.model.num_classes else Texts)(teacher.config, BATCH)
    runs = {name: (m, *m.generate()) for name, m in (("student", student), ("teacher", teacher))}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    index = np.arange(BATCH)
    for turn in range(rounds + 1):
        for name, (model, start, generate) in runs.items():
            inputs = start.inputs(index), *asked.conditions(index)
            begin = time.perf_counter()
            jax.block_until_ready(generate(model.params, *inputs))
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - begin)
    return {name: BATCH / statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", required=True, help="workdirs, such as one per seed")
    parser.add_argument("--others", nargs="*", default=[], help="also judge these, one per student")
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5, help="of the timing; 0 = none")
    args = parser.parse_args()
    found = []
    for place, path in enumerate(args.students):
        others = args.others[place : place + 1]
        rows, student, teacher = rows_of(path, others, args.num_samples)
        found.append(rows)
        print(
            path,
            {name: {k: round(v, 3) for k, v in row.items()} for name, row in rows.items()},
            flush=True,
        )
    names = [*next(iter(found[0].values()))]
    print(f"\n| medians of {len(found)} | {' | '.join(names)} |\n|{' --- |' * (1 + len(names))}")
    for row in found[0]:
        numbers = [statistics.median(each[row][name] for each in found) for name in names]
        print(f"| {row} | {' | '.join(f'{x:.3f}' for x in numbers)} |")
    if args.rounds:
        rate = speeds(student, teacher, args.rounds)
        print(
            f"\nbatch {BATCH}, load {os.getloadavg()[0]:.1f}: student {rate['student']:.1f} images/s, "
            f"teacher {rate['teacher']:.2f}, ratio {rate['student'] / rate['teacher']:.1f}"
        )


if __name__ == "__main__":
    restart_with_huge_pages()  # as the commands do
    main()
