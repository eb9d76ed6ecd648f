"""Compare one patch size for all stages with a larger one in the last stage, in equal training time.

    apt-get install dataset-fashion-mnist
    python benchmarks/patches.py --minutes=10 --workdir=runs/patches

Both variants of `fashion` train side by side, each on its own core, for as many steps as fit into the
given minutes; the steps are timed in the same way first. Then 1000 samples of each are judged as in
quality.py, and the samplers are timed in alternation on all cores. Prints a Markdown table. Takes
`--seeds` times the minutes, plus about ten.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from pixelflow_jax.common.memory import restart_with_huge_pages

FORMS = {"(2, 2, 2)": "(2,2,2)", "(2, 2, 4)": "(2,2,4)"}
HERE = pathlib.Path(__file__).resolve().parent
BATCH = 100  # images per call of the sampler in timings


def together(commands: list[list[str]]) -> list[str]:
    """Run commands simultaneously, each on its own core; return their output."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < len(commands):
        raise SystemExit(f"error: {len(commands)} cores are needed, there are {len(cores)}")
    running = [
        subprocess.Popen(
            ["taskset", "--cpu-list", str(core), sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for core, command in zip(cores, commands, strict=False)
    ]
    printed = [process.communicate()[0] for process in running]
    for command, process in zip(commands, running, strict=True):
        if process.returncode:
            raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}")
    return printed


def overrides(form: str) -> list[str]:
    """Return the config overrides of a variant."""
    return [f"model.patch_size={FORMS[form]}", "sample_every=0"]


def print_step_seconds(form: str) -> None:
    """Print the median seconds of a train step; this command runs it for each variant."""
    from official import our_train

    from pixelflow_jax.config import load_config

    step = our_train(load_config("fashion", overrides(form)))
    step()
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    print(json.dumps(statistics.median(times)))


def train(folder: pathlib.Path, minutes: float, seeds: int) -> dict[str, int]:
    """Train every variant from every seed, unless it exists; return the steps of each variant."""
    kept = folder / "steps.json"
    if kept.exists():
        steps = json.loads(kept.read_text())
    else:
        timed = together([[str(HERE / "patches.py"), "--time", form] for form in FORMS])
        steps = {
            form: int(60 * minutes / json.loads(seconds))
            for form, seconds in zip(FORMS, timed, strict=True)
        }
        kept.write_text(json.dumps(steps))
    print(f"steps in {minutes} minutes: {steps}", flush=True)
    for seed in range(seeds):
        begin = time.perf_counter()
        commands = []
        for form, count in steps.items():
            own = [*overrides(form), f"seed={seed}", f"num_train_steps={count}"]
            own += [f"checkpoint_every={count}"]
            where = f"--workdir={workdir(folder, form, seed)}"
            module = ["-m", "pixelflow_jax.train", "--config=fashion", where]
            commands.append([*module, *(f"--config.{entry}" for entry in own)])
        together(commands)
        print(f"seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
    return steps


def workdir(folder: pathlib.Path, form: str, seed: int) -> pathlib.Path:
    """Return the workdir of a run."""
    return folder / f"{form.strip('()').replace(', ', '')}_{seed}"


def sampling_seconds(folder: pathlib.Path, runs: int = 5) -> dict[str, float]:
    """Return seconds per image for each variant's sampler: medians of alternating calls."""
    import jax
    import numpy as np

    from pixelflow_jax.sampling.generate import build_sampler, make_generate
    from pixelflow_jax.sampling.sampler import class_conditions
    from pixelflow_jax.sampling.starts import FromSeed
    from pixelflow_jax.training.checkpoints import load_params

    calls, start, index = {}, FromSeed(0), np.arange(BATCH)
    conditions = class_conditions((index % 10).astype(np.int32), 10)
    for form in FORMS:
        params, config, _ = load_params(workdir(folder, form, 0), None)
        calls[form] = (make_generate(build_sampler(config), start), params)
    found = {form: [] for form in FORMS}
    for number in range(runs + 1):  # the first compiles
        for form, (generate, params) in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(generate(params, start.inputs(index), *conditions))
            if number:
                found[form].append((time.perf_counter() - begin) / BATCH)
    return {form: statistics.median(times) for form, times in found.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="training time per variant")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--workdir", help="where to train (default: a temporary folder)")
    parser.add_argument("--time", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        print_step_seconds(args.time)
        return
    folder = pathlib.Path(args.workdir or tempfile.mkdtemp(prefix="patches-"))
    folder.mkdir(parents=True, exist_ok=True)
    steps = train(folder, args.minutes, args.seeds)

    from quality import Judge, draw

    from pixelflow_jax.sampling.generate import save_grid

    judge, scores = None, {form: [] for form in FORMS}
    for form in FORMS:
        for seed in range(args.seeds):
            images, labels, config = draw(str(workdir(folder, form, seed)), args.num_samples)
            judge = judge or Judge(config)
            scores[form].append(judge.scores(images, labels))
            save_grid(workdir(folder, form, seed) / "quality.png", images)
    seconds = sampling_seconds(folder)
    print(
        "\n| patch sizes | steps | accuracy | Frechet ratio | ms per image |"
        "\n| --- | --- | --- | --- | --- |"
    )
    for form in FORMS:
        cells = [form, str(steps[form])]
        for name, style in (("accuracy", "{:.1%}"), ("frechet", "{:.2f}")):
            each = [one[name] for one in scores[form]]
            spread = ", ".join(style.format(x) for x in each)
            cells.append(f"{style.format(statistics.median(each))} ({spread})")
        print("| " + " | ".join([*cells, f"{1e3 * seconds[form]:.1f}"]) + " |")
    print(f"\nheld-out real images: accuracy {judge.real_accuracy:.1%}, Frechet ratio 1 by definition")


if __name__ == "__main__":
    restart_with_huge_pages()  # as the commands do
    main()
