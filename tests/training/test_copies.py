"""Checkpoints as people copy, rename, link and lose parts of them."""

import os
import shutil

import jax
import numpy as np
import pytest

import pixelflow_jax as pf
from pixelflow_jax import convert
from pixelflow_jax.common import UserError
from pixelflow_jax.training.checkpoints import find_step, load_params
from pixelflow_jax.training.start import initial_params

from conftest import TINY

STEP = "checkpoints/4"


def values(params):
    return [np.asarray(x) for x in jax.tree.leaves(params)]


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("name", ["best", "step 4", "4200", "x.orbax-checkpoint", "link", "2/4"])
def test_a_step_under_another_name(trained, tmp_path, name):
    """Catches a step that is taken for something else when it is renamed, copied or linked."""
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    if name == "link":
        place.symlink_to(trained / STEP)
    else:
        shutil.copytree(trained / STEP, place)
    params, config, meta = load_params(place)
    expected, own_config, own_meta = load_params(trained)
    assert config == own_config and meta["step"] == own_meta["step"] == 4
    for x, y in zip(values(params), values(expected), strict=True):
        np.testing.assert_array_equal(x, y)
    initial, _ = initial_params("init_from", str(place))
    for x, y in zip(values(initial), values(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_ways_to_name_a_run(trained, tmp_path):
    """Catches a workdir, its `checkpoints` or a link to either that leads to another step."""
    (tmp_path / "run").symlink_to(trained)
    (tmp_path / "steps").symlink_to(trained / "checkpoints")
    for place in (trained, trained / "checkpoints", tmp_path / "run", tmp_path / "steps"):
        folder, newest = find_step(place)
        assert newest and folder.name == "4"
    os.chdir(tmp_path)
    assert find_step("run")[0].name == "4"


def test_the_commands_take_it(trained, tmp_path):
    """Catches a command that finds checkpoints in its own way."""
    best = shutil.copytree(trained / STEP, tmp_path / "best")
    convert.main([f"--source={best}", "--to=official", f"--out={tmp_path / 'official'}"])
    images = pf.load(best).sample(num_images=1, num_steps=1)
    np.testing.assert_array_equal(images, pf.load(trained).sample(num_images=1, num_steps=1))


def test_without_the_average(run):
    """Catches raw parameters that are used in place of an average that a copy has lost."""
    raw = values(load_params(run, 0)[0])
    shutil.rmtree(run / STEP / "ema")
    for ema in (None, 0.998):
        with pytest.raises(UserError, match="4/ema is missing.*--ema=0 samples the raw parameters"):
            load_params(run, ema)
    params, _, meta = load_params(run, 0)
    assert meta["ema"] == 0
    for x, y in zip(values(params), raw, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("part", ["meta", "params", "ema"])
@pytest.mark.parametrize("all_of_it", [True, False])
def test_parts_that_are_missing(run, part, all_of_it):
    """Catches a missing part that is not reported, or an older step in place of a damaged one."""
    if all_of_it:
        shutil.rmtree(run / STEP / part)
    else:
        largest = max((run / STEP / part).rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
        largest.unlink()
    with pytest.raises(UserError, match="checkpoints/4"):
        load_params(run, 0 if part == "params" else None)


@pytest.mark.parametrize(
    "part", ["ema", *(pytest.param(x, marks=pytest.mark.slow) for x in ("params", "optimizer"))]
)
def test_resume_says_what_is_missing(run, part, caplog):
    """Catches a resume without a part of the state, or from an older step without a report."""
    shutil.rmtree(run / STEP / part)
    pf.fit(pf.load_config("digits", TINY), run)
    assert part in caplog.text and "checkpoint 4" in caplog.text
    assert (run / "damaged" / "4").exists()
