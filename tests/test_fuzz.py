"""A share of `tests/fuzz.py` on every run, and every crash that it has found."""

import importlib.util
import subprocess
import sys

import pytest
from fuzz import COMMANDS, SURFACES, fuzz

from pixelflow_jax import files
from pixelflow_jax.config import load_config
from pixelflow_jax.convert import official_config, official_yaml
from pixelflow_jax.errors import UserError, sentence

SLOW = {"checkpoint": 12, "config.yaml": 20}  # cases; a read or a trace each


@pytest.mark.parametrize("surface", SURFACES)
def test_fuzz(surface):
    """Catches a traceback, a hang or a stray file for absurd input."""
    counts, reports = fuzz([surface], SLOW.get(surface, 60), seed=1)
    assert not reports, "\n\n".join(reports)
    assert counts[surface]["refused"] > 0, "nothing was refused: the cases are too tame"


# Crashes that fuzzing found, as they were
FOUND = [
    ("pack", ["--path=x", "--out=y", "--shard_size=--"], "--shard_size: expected a value"),
    ("train", ["--workdir=x", "--config.model.depth=999999999999"], "model.depth"),
    ("train", ["--workdir=x", f"--config.model.num_classes={10**30}"], "num_classes"),
    ("train", ["--workdir=x", "--config.optimizer.learning_rate=1e400"], "not a number that can be"),
]


@pytest.mark.parametrize("name, argv, message", FOUND)
def test_found_flags(name, argv, message):
    """Catches them coming back."""
    with pytest.raises(UserError, match=message):
        COMMANDS[name][0](argv)


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": {"num_stages": 0}},
        {"scheduler": {"num_stages": 10**30}},
        {"model": {"params": {"depth": 10**9}}},
        {"model": {"params": {"num_classes": 2**63}}},
    ],
)
def test_found_official_configs(changes):
    """A division by zero, and minutes of making names."""
    values = official_yaml(load_config("configs/digits.py"))
    for section, entries in changes.items():
        for key, entry in entries.items():
            values[section][key] = {**values[section][key], **entry} if key == "params" else entry
    with pytest.raises(UserError):
        official_config(values)


def test_sentence():
    """Catches an error of several lines, with control characters, or without end."""
    assert sentence(ValueError("one\n  two\x00\x1b[2J")) == "one two\\x00\\x1b[2J"
    assert len(sentence(ValueError("x" * 10_000))) < 700
    assert sentence(KeyError()) == "KeyError"


def test_a_bucket_without_its_library(tmp_path):
    """Catches a traceback for a gs:// path without gcsfs, and one that is taken for a local path."""
    assert str(files.absolute("gs://x/y")) == "gs://x/y"
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed here")
    command = [
        sys.executable,
        "-m",
        "pixelflow_jax.sample",
        "--checkpoint=gs://x/y",
        f"--out={tmp_path}",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "pixelflow_jax[gcs]" in ended.stderr
    assert "Traceback" not in ended.stderr
