"""Runs, output folders and pictures of an earlier version (data/earlier_version.tar.xz).

Made with the digits config at one head of 8, one layer, a batch of 8 and 2 steps per stage:
- `run`: a training run after 2 steps;
- `mixed`: the same with data.max_aspect_ratio=2 and the removed data.mix_sizes=true;
- `half`: an output folder of 4 images, stopped after the first batch of 2;
- `half_budget`: the same with the removed --nfe_budget=6;
- `picture.png`, `picture_budget.png`: image 3 of those two requests, run to the end.
"""

import importlib.metadata
import json
import pathlib
import tarfile

import numpy as np
import pytest

from pixelflow_jax import sample, train
from pixelflow_jax.common import UserError
from pixelflow_jax.common.files import read_json
from pixelflow_jax.requests.job import PACKAGES
from pixelflow_jax.sampling.generate import png_settings, read_image

ARCHIVE = pathlib.Path(__file__).parent.parent / "data" / "earlier_version.tar.xz"
FLAGS = [
    *("num_heads=1", "head_dim=8", "depth=1"),
    *("batch_size=8", "log_every=1", "checkpoint_every=2", "sample_every=0", "num_train_steps=4"),
    *("optimizer.learning_rate=3e-3", "optimizer.schedule=cosine"),  # the config's, then
]
FLAGS = [f"--config.{'model.' * (i < 3)}{flag}" for i, flag in enumerate(FLAGS)]
LOSSES = {3: 0.5542293, 4: 0.5896260}  # of that version


@pytest.fixture
def old(tmp_path):
    """The unpacked archive, its output folders moved to this machine and its packages."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in ("half", "half_budget"):
        path = tmp_path / name / "settings.json"
        settings = read_json(path) | {"checkpoint": str(tmp_path / "run")}
        settings["versions"] |= versions
        path.write_text(json.dumps(settings))
    return tmp_path


def assert_same_picture(pixels, path):
    """To a level of 255: the programs of other XLA versions and machines may round otherwise."""
    assert np.abs(pixels.astype(int) - read_image(path).astype(int)).max() <= 1


@pytest.mark.slow
def test_a_run_resumes(old):
    """Catches a config.json or a checkpoint that cannot be read, and steps on other data or weights."""
    train.main(["--config=digits", f"--workdir={old / 'run'}", *FLAGS])
    rows = [json.loads(line) for line in (old / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows}
    assert losses.keys() == {1, 2, 3, 4}
    for step, loss in LOSSES.items():
        assert losses[step] == pytest.approx(loss, rel=1e-4)


def test_a_run_with_a_removed_key_that_had_an_effect(old):
    """Catches a run that continues with other batches than it had, and weights that are lost."""
    aspect = ["--config.data.max_aspect_ratio=2", "--config.data.bucket_unit=8"]
    with pytest.raises(UserError, match="data.mix_sizes=True, which was removed"):
        train.main(["--config=digits", f"--workdir={old / 'mixed'}", *FLAGS, *aspect])
    sample.main([f"--checkpoint={old / 'mixed'}", f"--out={old / 'out'}", "--num_images=1"])
    assert read_image(old / "out" / "000000.png").shape == (16, 16, 3)


def test_an_output_folder_is_completed(old):
    """Catches settings that differ for the same request, and images that are made twice."""
    folder = old / "half"
    made = np.load(folder / "shards" / "00000000-00000002.npz")["arr_0"]
    flags = [f"--checkpoint={old / 'run'}", "--num_images=4", "--batch_size=2"]
    sample.main([f"--out={folder}", *flags])
    images = np.load(folder / "samples.npz")["arr_0"]
    np.testing.assert_array_equal(images[:2], made)
    assert_same_picture(images[3], old / "picture.png")
    with pytest.raises(UserError, match="nfe_budget"):
        sample.main([f"--out={old / 'half_budget'}", *flags, "--num_steps=5,1"])


@pytest.mark.parametrize("name", ["picture.png", "picture_budget.png"])
def test_a_picture_is_made_again(old, name):
    """Catches settings in a PNG file that are refused, or that make another picture."""
    assert "nfe_budget" in png_settings(old / name)
    sample.main([f"--checkpoint={old / 'run'}", f"--out={old / 'out'}", f"--from_png={old / name}"])
    assert_same_picture(read_image(old / "out" / "000000.png"), old / name)
