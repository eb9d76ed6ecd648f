"""Kill a training run repeatedly at random moments, and verify that nothing is lost.

    python benchmarks/resume_stress.py --kills=20

SIGKILL stops the run at random times (starting, stepping, saving); each time it is started again. At the
end, its losses and parameters must equal those of an uninterrupted run bit for bit. Extra flags, such as
--config.mesh.fsdp=2, are passed to training.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from pixelflow_jax.training.checkpoints import load_params

SMALL = (
    "model.num_heads=2 model.head_dim=8 model.depth=2 batch_size=8 sample_every=0 log_every=3 "
    "checkpoint_every=5"
).split()


def start(workdir: pathlib.Path, flags: list[str]) -> subprocess.Popen:
    """Start or resume the run."""
    command = [sys.executable, "-m", "pixelflow_jax.train", f"--workdir={workdir}", *flags]
    log = open(f"{workdir}.log", "a")  # an unread pipe would fill up and block the run
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, text=True)


def newest(workdir: pathlib.Path) -> int:
    """Return the step of the newest checkpoint."""
    steps = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
    return max(steps, default=0)


def saving(workdir: pathlib.Path) -> bool:
    """Return whether a checkpoint is being written."""
    return any("tmp" in p.name for p in workdir.glob("checkpoints/*"))


def wait_to_kill(child: subprocess.Popen, workdir: pathlib.Path, rng: random.Random) -> str | None:
    """Wait for a random moment and return its description, or None if the run ended first."""
    before = newest(workdir)
    aim = rng.choice(["save", "step", "start"])
    if aim == "start":
        end = time.monotonic() + rng.uniform(0, 12)
        while time.monotonic() < end and child.poll() is None:
            time.sleep(0.01)
        return "in the first seconds" if child.poll() is None else None
    while child.poll() is None:
        if aim == "save" and saving(workdir):
            time.sleep(rng.uniform(0, 0.03))
            return "while saving" if child.poll() is None else None
        if aim == "step" and newest(workdir) > before:
            time.sleep(rng.uniform(0, 0.3))
            return "between saves" if child.poll() is None else None
        time.sleep(0.001)
    return None


def numbers(workdir: pathlib.Path) -> list[tuple]:
    """Return (step, loss, gradient norm, parameter norm) of every logged row."""
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["param_norm"]) for row in rows]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args, more = parser.parse_known_args()
    rng = random.Random(args.seed)
    work = pathlib.Path(tempfile.mkdtemp(prefix="resume-stress-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "cache"))
    flags = [f"--config.{override}" for override in SMALL] + more
    flags.append(f"--config.num_train_steps={args.steps}")

    whole = start(work / "whole", flags)
    assert whole.wait() == 0, f"see {work}/whole.log"
    kills = 0
    while kills < args.kills:
        child = start(work / "killed", flags)
        moment = wait_to_kill(child, work / "killed", rng)
        child.kill()
        child.wait()
        if moment is None:
            sys.exit(f"the run ended after {kills} kills; increase --steps")
        kills += 1
        print(f"kill {kills:>2} {moment:<22} newest checkpoint {newest(work / 'killed')}", flush=True)
    last = start(work / "killed", flags)
    assert last.wait() == 0, f"see {work}"

    assert numbers(work / "killed") == numbers(work / "whole"), "the logged numbers differ"
    ours, theirs = (load_params(work / name, ema=0)[0] for name in ("killed", "whole"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = len(numbers(work / "whole"))
    print(f"{kills} kills: {rows} logged rows and all parameters are bit-identical ({work})")


if __name__ == "__main__":
    main()
