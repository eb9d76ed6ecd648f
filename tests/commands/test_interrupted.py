"""Commands that are killed leave no half file under a final name, and can be started again."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import pixelflow_jax as pf
from pixelflow_jax.common import arrays
from pixelflow_jax.sampling.generate import save_png

from conftest import TINY

KILLS = 3  # of each command, at random moments
SEED = 0


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A run, samples of it, and a folder of images."""
    folder = tmp_path_factory.mktemp("given")
    pf.fit(pf.load_config("configs/digits.py", TINY), folder / "run")
    pixels = pf.load(folder / "run").sample(num_images=60, num_steps=2)
    arrays.write_npz(folder / "samples.npz", {"arr_0": (pixels.shape, pixels.dtype, [pixels])})
    for number, image in enumerate(pixels):
        path = folder / "pictures" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, image)
    return folder


def check_whole(folder: pathlib.Path) -> None:
    """Raises if a file under a final name is not whole."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") or ".orbax-checkpoint-tmp" in part for part in path.parts)
        if hidden or not path.is_file() or path.name.endswith(".tmp"):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as npz:
                assert all(npz[name].size for name in npz.files)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".safetensors":
            load_file(path)


COMMANDS = {
    "train": ["--workdir={out}", *(f"--config.{entry}" for entry in TINY), "--config.sample_every=1"],
    "sample": ["--checkpoint={given}/run", "--out={out}", "--num_images=60", "--batch_size=5"],
    "convert": ["--source={given}/run", "--to=official", "--format=safetensors", "--out={out}"],
    "evaluate": ["--samples={given}/samples.npz", "--reference={given}/samples.npz", "--features=pca",
                 "--out={out}/metrics.json"],
    "pack": ["--path={given}/pictures", "--out={out}", "--shard_size=8"],
}  # fmt: skip
# Where a command says no to what a killed one left, in place of going on: it names the folder
REFUSE = {"convert"}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed(name, given, tmp_path):
    """Catches a file that is written in place, and a folder that a killed command leaves unusable."""
    out, rng = tmp_path / "out", random.Random(f"{name} {SEED}")
    argv = [word.format(given=given, out=out) for word in COMMANDS[name]]
    command = [sys.executable, "-m", f"pixelflow_jax.{name}", *argv]
    begin = time.monotonic()
    whole = subprocess.run(
        [w.replace(str(out), str(tmp_path / "whole")) for w in command], capture_output=True
    )
    seconds = time.monotonic() - begin
    assert whole.returncode == 0, whole.stderr
    check_whole(tmp_path / "whole")
    for _ in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * rng.uniform(0.3, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        check_whole(tmp_path)
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 or (name in REFUSE and str(out) in ended.stderr), ended.stderr
    check_whole(tmp_path)
