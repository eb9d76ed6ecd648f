"""Sampling and evaluation with several real processes on this machine, some of which are killed."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pixelflow_jax.common import arrays
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.training.checkpoints import save_params

from conftest import TINY, calm

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("scale") / "run"
    config = load_config("configs/digits.py", TINY)
    save_params(workdir, calm(build_model(config)), config)
    return workdir


def start(count, command, *flags, env=()):
    """Start the command as `count` processes."""
    return subprocess.Popen(
        [ROOT / "launch" / "local_hosts.sh", str(count), command, *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "END_SECONDS": "40"} | dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(child):
    out, _ = child.communicate(timeout=600)
    return child.returncode, out


def kill(out, index=None) -> None:
    """Kill (-9) one process that writes `out`, or all."""
    for folder in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not folder.name.isdigit():
                continue
            if f"--out={out}".encode() not in (folder / "cmdline").read_bytes().split(b"\0"):
                continue
            environ = (folder / "environ").read_bytes().split(b"\0")
            if index is None or f"JAX_PROCESS_ID={index}".encode() in environ:
                if any(entry.startswith(b"JAX_PROCESS_ID=") for entry in environ):
                    os.kill(int(folder.name), signal.SIGKILL)


def test_killed_in_the_middle_of_2000_images(checkpoint, tmp_path):
    """Catches images lost, repeated or changed by a kill: the npz must have the same bytes."""
    flags = [f"--checkpoint={checkpoint}", "--num_images=2000", "--batch_size=20", "--num_png=0"]
    flags += ["--num_steps=300"]  # slow enough to be hit in the middle
    whole = tmp_path / "whole" / "samples.npz"
    code, text = finish(start(2, "sample", *flags, f"--out={whole.parent}"))
    assert code == 0, text
    out = tmp_path / "killed"
    for victim in (1, 0, None):
        before = len(list(out.glob("shards/*.npz")))
        child = start(2, "sample", *flags, f"--out={out}")
        end = time.monotonic() + 200
        while len(list(out.glob("shards/*.npz"))) < before + 4:
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.02)
        kill(out, victim)
        code, text = finish(child)
        assert code != 0 and not (out / "samples.npz").exists()
        if victim is not None:
            assert f"process {victim}" in text and "start the same command again" in text, text
    assert 12 <= len(list(out.glob("shards/*.npz"))) < 100
    code, text = finish(start(2, "sample", *flags, f"--out={out}"))
    assert code == 0, text
    assert (out / "samples.npz").read_bytes() == whole.read_bytes()


def test_processes_and_devices_make_the_same_images(checkpoint, tmp_path):
    """Catches an image or a metric that depends on the process that computes it."""
    found = {}
    for name, count, devices in (("one", 1, 1), ("eight", 1, 8), ("two", 2, 1)):
        out = tmp_path / name
        flags = [f"--checkpoint={checkpoint}", f"--out={out}", "--num_images=50", "--batch_size=16"]
        code, text = finish(start(count, "sample", *flags, env={"DEVICES": str(devices)}))
        assert code == 0, text
        found[name] = arrays.read_npz(out / "samples.npz", "arr_0").astype(int)
    for name in ("eight", "two"):
        different = np.abs(found[name] - found["one"])  # rounding to a pixel may fall the other way
        assert different.max() <= 1 and (different > 0).mean() < 1e-3

    judged = []
    for count in (1, 2):
        out = tmp_path / f"metrics{count}.json"
        flags = [f"--samples={tmp_path / 'one'}", "--reference=configs/digits.py", "--features=pca"]
        code, text = finish(start(count, "evaluate", *flags, "--batch_size=7", f"--out={out}"))
        assert code == 0, text
        judged.append(json.loads(out.read_text()))
    assert judged[0].keys() == judged[1].keys()
    for name, value in judged[0].items():
        assert judged[1][name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)
