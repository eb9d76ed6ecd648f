"""A share of `tests/fuzz.py` on every run, and every crash that it has found."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from fuzz import COMMANDS, SURFACES, fuzz

from pixelflow_jax.common import UserError, files, sentence
from pixelflow_jax.config import load_config
from pixelflow_jax.foreign.official import official_config, official_yaml, read_official
from pixelflow_jax.requests.layouts import read_prompts_file
from pixelflow_jax.training.checkpoints import load_params, open_manager

# Of a damaged checkpoint Orbax's other reads fail unheard; in a command, cli.run keeps them quiet
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
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
    ("train", ["--workdir=x", "--config.optimizer.learning_rate=1e400"], "not a finite number"),
    ("train", ["--workdir=x", f"--config.model.depth={'(' * 10_000}"], "expected a value like"),
    ("train", ["--workdir=no://x"], "begin with gs://"),
    ("train", ["--workdir=x", "--config="], "installed configs"),
    ("encode", ["--captions=x", "--out=y", "--config.seed=1"], "needs --config"),
    ("train", ["--workdir=x", "--config.data.path=no://x"], "begin with gs://"),
    ("encode", ["--config=configs/t2i_256.py", "--encoder=a://b", "--out=x"], "begin with gs://"),
    ("pack", ["--path=x", "--out=\udcff"], "not UTF-8"),
    ("pack", ["--path=x", "--out=a\0"], "not UTF-8"),
    ("sample", ["--checkpoint=x", "--out=y", "--from_png=/dev/full"], "device"),
    (
        "evaluate",
        ["--samples=/dev/full", "--reference=/dev/zero", "--features=pca", "--out=x"],
        "device",
    ),
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


def test_devices_have_no_end():
    """Catches reading /dev/zero until the memory is used up."""
    with pytest.raises(OSError, match="device"):
        files.read_bytes("/dev/full")
    with pytest.raises(OSError, match="device"):
        read_prompts_file("/dev/zero")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"prompt": ' + "9" * 5000 + "}"])
def test_json_too_deep_or_long(tmp_path, text):
    """Catches errors of the JSON and YAML readers that are not of their own kinds."""
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="JSON"):
        files.read_json(path) if text[0] != "{" else read_prompts_file(str(path))
    with pytest.raises(UserError, match="JSON"):
        read_prompts_file(str(path))
    shutil.copy(path, tmp_path / "config.yaml")
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    with pytest.raises(UserError, match="YAML|section|model"):
        read_official(tmp_path / "x.npz")


def test_walk_ends_where_links_lead_up(tmp_path):
    """Catches pictures found forty times, and walks without end; links out are followed."""
    for name in ("a", "a-1", "a/sub", "other"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "x.png").touch()
    (tmp_path / "root/a/up").symlink_to("..")
    (tmp_path / "root/a/me").symlink_to(tmp_path / "root/a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").touch()
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/again").symlink_to(tmp_path / "root/other")
    walked = files.walk(str(tmp_path / "root"))
    assert walked == [("", []), ("a/", ["x.png"]), ("a-1/", ["x.png"]), ("a/sub/", ["x.png"]),
                      ("linked/", ["x.png"]), ("other/", ["x.png"])]  # fmt: skip
    assert files.walk(str(tmp_path / "root"), "a") == [walked[1], walked[3]]


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


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda meta: meta["config"].update(model=7), "expected a value like"),
        (lambda meta: meta["config"]["sample"].update(num_steps=[{}]), "expected a value like"),
        (lambda meta: meta["config"]["sample"].update(guidance_interval=[None, 1]), "a value like"),
        (lambda meta: meta["config"].update(dtype="ü"), "must be one of"),
        (lambda meta: meta["config"]["model"].update(depth=10**30), "must lie in"),
        (lambda meta: meta.update(config=[]), "expected a value like"),
        (lambda meta: meta["config"]["model"].update(rope=1), "not a key of this version"),
        (lambda meta: meta["config"]["model"].update(head_dim=10), "not a whole checkpoint"),
        (None, "not a whole checkpoint"),
    ],
)
def test_found_checkpoints(trained, tmp_path, change, message):
    """Catches tracebacks of a checkpoint whose notes hold values of other kinds."""
    run = shutil.copytree(trained, tmp_path / "run")
    (path,) = (run / "checkpoints" / "4" / "meta").glob("metadata")
    meta = json.loads(path.read_text())
    if change:
        change(meta)
    path.write_text(json.dumps(meta) if change else "[" * 100_000)
    with pytest.raises(UserError, match=message):
        load_params(run)


@pytest.mark.parametrize(
    "change", [{"custom_metadata": 7}, {"commit_timestamp_nsecs": "x"}, {"no": 1}, {"deep": 1}]
)
def test_found_checkpoint_of_orbax(trained, tmp_path, change):
    """Catches a traceback where Orbax's own notes of a step are damaged; the step itself is whole."""
    run = shutil.copytree(trained, tmp_path / "run")
    path = run / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    notes = json.dumps(json.loads(path.read_text()) | {"custom_metadata": {"a": 1}} | change)
    path.write_text("[" * 100_000 if "deep" in change else notes)
    assert load_params(run)[2]["step"] == 4
    with pytest.raises(UserError, match="whole checkpoints"):
        open_manager(run)
