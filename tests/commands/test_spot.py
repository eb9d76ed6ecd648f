"""launch/spot.sh end to end: real training on a machine that is preempted five times."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from pixelflow_jax.training.checkpoints import load_params

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 120
# A cloud with one TPU VM, represented by a folder; it affects only the processes of this run.
GCLOUD = """\
#!/usr/bin/env bash
cloud={cloud}
export HOME=$cloud/home
case "$*" in
  *"queued-resources describe"*) cat $cloud/state 2>/dev/null || {{ echo NOT_FOUND >&2; exit 1; }} ;;
  *"queued-resources create"*) mkdir -p $HOME && echo ACTIVE >$cloud/state ;;
  *"queued-resources delete"*) pkill -KILL -f "train .*--workdir={workdir}"; rm -rf $cloud/state $HOME ;;
  *"uv venv"*)
    mkdir -p $HOME/pixelflow_run/venv/bin && ln -sfn {root} $HOME/pixelflow_run/code
    echo 'PATH={python}:$PATH' >$HOME/pixelflow_run/venv/bin/activate ;;
  *" scp "*) ;;
  *" ssh "*)
    [[ "$(cat $cloud/state)" == ACTIVE ]] || exit 255
    for last; do :; done
    last=${{last#--command=}}
    only="pixelflow_jax[.]train .*--workdir={workdir}"
    cd $HOME && bash -c "${{last//pixelflow_jax\\[.\\](train|doctor)/$only}}" ;;
esac
"""


@pytest.mark.slow
def test_five_preemptions_change_nothing(tmp_path, tiny_flags):
    """Catches a step lost or repeated by a preemption, with and without the loss of the machine."""
    flags = [*tiny_flags, f"--config.num_train_steps={STEPS}", "--config.checkpoint_every=7"]
    flags += ["--config.log_every=1", "--config.batch_size=16"]
    flags += ["--no_compile_cache"]  # which is in the bucket: each start would look for it
    run, whole, cloud = tmp_path / "run", tmp_path / "whole", tmp_path / "cloud"
    train = [sys.executable, "-m", "pixelflow_jax.train", f"--workdir={whole}", *flags]
    subprocess.run(train, cwd=ROOT, check=True, capture_output=True)

    fakes = tmp_path / "bin"
    fakes.mkdir()
    python = pathlib.Path(sys.executable).parent
    text = GCLOUD.format(cloud=cloud, workdir=run, root=ROOT, python=python)
    (fakes / "gcloud").write_text(text)
    (fakes / "gcloud").chmod(0o755)
    settings = "PROJECT=p ZONE=us-central2-b NAME=n TYPE=v4-8 RUNTIME=r BUCKET=gs://b".split()
    settings += ["CONFIG=configs/digits.py", f"WORKDIR={run}", f"FLAGS={' '.join(flags)}"]
    (tmp_path / "settings.env").write_text("\n".join(settings) + "\n")
    env = os.environ | {"PATH": f"{fakes}:{os.environ['PATH']}", "POLL_SECONDS": "0.3"}
    env |= {"TMPDIR": str(tmp_path)}
    command = [ROOT / "launch" / "spot.sh", f"--settings={tmp_path / 'settings.env'}", "--any_region"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (tmp_path / "cloud").mkdir()
    spot = subprocess.Popen(command, env=env, **pipes)

    rng = random.Random(0)
    for turn in range(5):
        target = rng.randint(len(logged(run)) + 1, len(logged(run)) + 8)
        pid = wait_for_step(spot, run, target)
        os.kill(pid, signal.SIGTERM)
        if turn % 2:  # the machine disappears a moment later
            time.sleep(rng.random())
            (cloud / "state").write_text("SUSPENDED\n")
            subprocess.run(["pkill", "-KILL", "-f", f"train .*--workdir={run}"], check=False)
        while is_alive(pid):
            time.sleep(0.05)
    output = spot.communicate(timeout=600)[0]
    assert spot.returncode == 0 and "training is complete" in output, output
    # a training that has ended before its machine goes is started again for each of the two
    assert 5 <= output.count("preempted: starting again") <= 7, output
    assert not (cloud / "state").exists()
    assert logged(run) == logged(whole)
    ours, theirs = load_params(run)[0], load_params(whole)[0]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def logged(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]


def wait_for_step(spot, workdir, target) -> int:
    """Wait until training has logged `target` steps; return its pid."""
    end = time.monotonic() + 120
    pattern = f"^python -m pixelflow_jax.train .*--workdir={workdir}"
    while True:
        assert spot.poll() is None, spot.communicate()[0]
        assert time.monotonic() < end, "no progress"
        found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
        if found and len(logged(workdir)) >= target:
            return int(found[0])
        time.sleep(0.02)


def is_alive(pid) -> bool:
    try:
        return "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
