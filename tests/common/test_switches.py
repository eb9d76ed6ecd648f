"""JAX's own switches: the same images and the same training, or a record that they were not as usual."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from fingerprint import fingerprints

from pixelflow_jax.common import numerics
from pixelflow_jax.sampling.starts import image_keys

HERE = pathlib.Path(__file__).parents[1]
# Switches that change numbers or break programs, to a value that JAX does not have by itself
HOSTILE = {
    "jax_default_prng_impl": "rbg",
    "jax_disable_jit": True,
    "jax_enable_x64": True,
    "jax_legacy_prng_key": "error",
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_random_seed_offset": 3,
    "jax_softmax_custom_jvp": True,
    "jax_threefry_partitionable": False,
    "jax_transfer_guard": "disallow",
}
MORE = {
    "jax_check_tracer_leaks": True,
    "jax_debug_key_reuse": True,
    "jax_debug_nans": True,
    "jax_default_matmul_precision": "bfloat16",
    "jax_enable_checks": True,
    "jax_enable_custom_prng": True,
    "jax_no_execution": True,
    "jax_no_tracing": True,
}


@pytest.fixture
def hostile():
    """All hostile switches of this version of JAX at once."""
    before = {name: jax.config.values[name] for name in HOSTILE if name in jax.config.values}
    for name in before:
        jax.config.update(name, HOSTILE[name])
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def usual(trained):
    """What there is without switches."""
    return fingerprints(str(trained))


def test_no_switch_changes_images_or_training(trained, usual, hostile):
    """Catches numbers that depend on the environment: keys, dtypes, promotion, how programs are run."""
    found = fingerprints(str(trained))
    assert found == usual and found["pipeline"] == found["sample"]
    assert jax.config.values["jax_default_prng_impl"] == "rbg"  # nobody else's switches were touched


@pytest.mark.parametrize("name", ["jax_disable_most_optimizations", "jax_optimization_level"])
def test_switches_of_the_compiler_are_recorded(name):
    """Catches images whose last bits another program made, with nothing in settings.json of it."""
    before, value = jax.config.values[name], {"jax_optimization_level": "O1"}.get(name, True)
    assert numerics.switches() == {}
    jax.config.update(name, value)
    try:
        assert numerics.switches() == {name: value}
    finally:
        jax.config.update(name, before)


def test_keys_are_those_of_jax_as_it_comes(hostile):
    """Catches keys of another seed, and noise that differs from that of images made before."""
    seeds = [0, 1, 2**31, 2**32 - 1]
    with numerics.pinned():
        words = [jax.random.key_data(numerics.key(seed)) for seed in (*seeds, 7 + 2**32)]
        np.testing.assert_array_equal(words, [[0, seed] for seed in (*seeds, 7)])
        assert image_keys(3, np.arange(2, dtype=np.int32)).dtype == numerics.key(0).dtype


@pytest.mark.slow
@pytest.mark.parametrize("group", range(6))
def test_no_switch_of_the_environment_changes_anything(group, trained, usual):
    """Catches the same as users have them: a few at a time, by the environment of a process."""
    switches = dict([*HOSTILE.items(), *MORE.items()][group::6])
    env = os.environ | {name.upper(): str(value) for name, value in switches.items()}
    env["PYTHONPATH"] = str(HERE.parent)
    command = [sys.executable, HERE / "fingerprint.py", str(trained)]
    child = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    assert json.loads(child.stdout.splitlines()[-1]) == usual


def test_every_key_is_made_in_one_place():
    """Catches a key of JAX's default implementation: another one where the environment says so."""
    pattern = re.compile(r"random\.(key|PRNGKey|wrap_key_data)\(")
    files = (HERE.parent / "pixelflow_jax").rglob("*.py")
    assert {path.name for path in files if pattern.search(path.read_text())} == {"numerics.py"}
