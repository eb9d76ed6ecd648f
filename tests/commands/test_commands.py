"""The commands as a user runs them: outputs, resuming, and one clear sentence for bad input."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from pixelflow_jax import convert, sample, train
from pixelflow_jax.common import UserError, cli, files
from pixelflow_jax.config import load_config
from pixelflow_jax.distributed import watchdog
from pixelflow_jax.requests import job
from pixelflow_jax.training import loop

from conftest import TINY


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A workdir with checkpoints at steps 2 and 4."""
    config = load_config("configs/digits.py", [*TINY, "sample_every=4"])
    workdir = tmp_path_factory.mktemp("trained") / "run"
    loop.train(config, workdir)
    return workdir


@pytest.fixture
def trained(trained_once, tmp_path_factory):
    """A copy of it, to damage at will."""
    return pathlib.Path(shutil.copytree(trained_once, tmp_path_factory.mktemp("copy") / "run"))


def shell(module, *args):
    """Runs a command as a subprocess."""
    command = [sys.executable, "-m", f"pixelflow_jax.{module}", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def contents(folder: pathlib.Path):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_train_writes_what_the_docs_say(trained):
    """Catches a file of the workdir that is missing or renamed."""
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert len(rows[0]["loss_per_stage"]) == 2 and rows[0]["images_per_s"] > 0
    assert Image.open(trained / "samples" / "4.png").size == (4 * 50, 3 * 50)
    assert (trained / "checkpoints" / "4").is_dir() and list((trained / "tensorboard").iterdir())
    assert json.loads((trained / "config.json").read_text())["model"]["depth"] == 2


def test_sample_writes_completes_and_refuses(trained, tmp_path, capsys):
    """Catches files that differ from the docs, a completion that changes images, an overwrite."""
    out = tmp_path / "out"
    flags = [f"--checkpoint={trained}", f"--out={out}", "--num_images=5", "--batch_size=2"]
    sample.main(flags)
    assert str(out / "grid.png") in capsys.readouterr().out
    before = contents(out)
    names = [f"{i:06d}.png" for i in range(5)]
    assert sorted(before) == sorted([*names, "grid.png", "samples.npz", "settings.json"])
    with np.load(out / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 16, 16, 3) and file["arr_0"].dtype == np.uint8
        assert file["labels"].tolist() == [0, 1, 2, 3, 4]
        for i, name in enumerate(names):
            np.testing.assert_array_equal(np.asarray(Image.open(out / name)), file["arr_0"][i])
    for name in ("000001.png", "000004.png", "samples.npz"):
        (out / name).unlink()
    (out / "000002.png").write_bytes(before["000002.png"][:60])  # damaged: it is drawn again
    sample.main(flags)
    after = contents(out)
    assert all(after[name] == before[name] for name in names)
    with pytest.raises(UserError, match="seed differ"):
        sample.main([*flags, "--seed=1"])
    assert contents(out) == after


def test_sample_flags_reach_the_sampler(trained, tmp_path):
    """Catches a flag that is parsed and ignored."""
    images = []
    for i, flag in enumerate(
        ["--seed=0", "--solver=heun", "--num_steps=1,3", "--grid=reference", "--ema=0", "--labels=7"]
    ):
        out = tmp_path / str(i)
        sample.main([f"--checkpoint={trained}", f"--out={out}", "--num_images=1", flag])
        images.append((out / "settings.json").read_text())
    assert len(set(images)) == len(images)
    tall = tmp_path / "tall"
    sample.main([f"--checkpoint={trained}", f"--out={tall}", "--labels=1", "--height=32", "--width=16"])
    assert Image.open(tall / "000000.png").size == (16, 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.dept=3"], "did you mean config.model.depth"),
        (["--config.model.depth=many"], "expected a value like"),
        (["--config.data.resolution=18"], "height 18 must be a positive multiple of 8"),
        (["--config.seed=-1"], "at least 0"),
        (["--config.init_from=nowhere"], "no such file or folder"),
        (["--config.mesh.fsdp=0"], "at least 1"),
        (["--config.data.split=val"], "train or test for digits"),
        (["--config.batch_size=7"], "the next is 8"),
        (["--config.num_train_steps=0"], "at least 1"),
        (["--config.num_train_steps=-5"], "at least 1"),
        (["--config.sample.num_images=0"], "at least 1"),
        (["--config.data.label_dropout=10"], r"must lie in \[0, 1\]"),
        (["--config.model.scan_unroll=0"], "at least 1"),
        (["--config.model.depth", "12"], "write it as --config.model.depth=VALUE"),
        (["--config.optimizer.schedule=step"], "one of constant, cosine"),
        (["--config.data.source=imagenet"], "one of digits, captioned_digits"),
        (["--config.model.num_classes=5"], "has 10 classes"),
        (["--config.mesh.data=4"], "do not fit"),
        (["--config=nothing.py"], "installed configs: digits"),
        (["--config.model.head_dim=6"], "multiple of 4"),
    ],
)
def test_bad_training_flags(tmp_path, flags, message):
    """Catches a traceback, or a workdir that is claimed before its config is known to be good."""
    with pytest.raises(UserError, match=message):
        train.main([f"--workdir={tmp_path / 'run'}", *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "x = (", "failed: SyntaxError"),
        ("b.py", "x = 1", "has no attribute 'get_config'"),
        ("c.json", "{}", "is a Python file"),
    ],
)
def test_broken_config_files(tmp_path, name, text, message):
    """Catches a traceback for a file that is not a config."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        train.main([f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / name}"])


def test_a_folder_of_something_else_is_refused(tmp_path, tiny_flags):
    """Catches training into, or sampling over, files that are not ours."""
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(UserError, match="holds files but no run"):
        train.main([f"--workdir={tmp_path}", *tiny_flags])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    for command, flag in ((train, "workdir"), (convert, "out")):
        with pytest.raises(UserError, match="is a file"):
            other = ["--source=x"] if command is convert else tiny_flags
            command.main([f"--{flag}={tmp_path / 'thesis.tex'}", *other])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        train.main([f"--workdir={tmp_path}", *tiny_flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels=3,10"], "10 is not a class; they are 0 to 9"),
        (["--labels=cat"], "whole numbers"),
        (["--num_images=0"], "at least 1"),
        (["--batch_size=0"], "at least 1"),
        (["--num_steps=0"], "at least 1"),
        (["--num_steps=5,-1"], "at least 1"),
        (["--num_steps=5,5,5"], "3 entries for 2 stages"),
        (["--height=20"], "multiple of 8"),
        (["--height=0"], "multiple of 8"),
        (["--ema=0.5"], "0 is without"),
        (["--guidance_scale=nan"], "finite"),
        (["--shift=-1"], r"--shift must lie in \(0, "),
    ],
)
def test_bad_sampling_flags(trained, tmp_path, flags, message):
    """Catches a traceback, or an output folder made for a request that cannot be met."""
    with pytest.raises(UserError, match=message):
        sample.main([f"--checkpoint={trained}", f"--out={tmp_path / 'out'}", *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error:divide by zero")
def test_a_model_without_conditions(tmp_path, tiny_flags):
    """Catches training or sampling that needs classes where the config says that there are none."""
    flags = [*tiny_flags, "--config.model.num_classes=0", "--config.sample_every=4"]
    train.main([*flags, f"--workdir={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "samples" / "4.png").exists()
    sample.main([f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--num_images=3"])
    again = ["--from_png", str(tmp_path / "out" / "000002.png"), "--out", str(tmp_path / "again")]
    sample.main([f"--checkpoint={tmp_path / 'run'}", *again])
    pixels = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("out", "again")]
    assert len(pixels[0]) == 3 and (pixels[1] == pixels[0][2:]).all()


def test_checkpoints_that_are_not_one(trained, tmp_path):
    """Catches a traceback from deep inside Orbax."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("nowhere", "no such folder"),
        ("empty", "no checkpoint"),
        ("file", "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            sample.main([f"--checkpoint={tmp_path / name}", f"--out={tmp_path / 'out'}"])
    for meta in (trained / "checkpoints" / "4" / "meta").iterdir():
        meta.write_text("damaged")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        sample.main([f"--checkpoint={trained}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    other = tmp_path / "out2"
    sample.main([f"--checkpoint={trained / 'checkpoints' / '2'}", f"--out={other}", "--labels=1"])


def test_exit_codes_and_no_traceback(tmp_path):
    """Catches bad input that exits 0 or prints a traceback; checks what in-process tests cannot."""
    for module, *flags in (
        ("train", f"--workdir={tmp_path / 'run'}", "--config.batch_size=7"),
        ("sample", f"--checkpoint={tmp_path}", f"--out={tmp_path / 'out'}"),
        ("convert", f"--source={tmp_path / 'nothing'}", f"--out={tmp_path / 'out'}"),
        ("sample", "--solver=magic"),
    ):
        result = shell(module, *flags)
        assert result.returncode == 2, result
        assert "Traceback" not in result.stderr and "error:" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_reports_end_as_errors_do(monkeypatch, capsys):
    """Catches a process that says what is wrong and then waits for the others of its run for minutes."""
    left = []
    monkeypatch.setattr(cli.ends, "leave", left.append)
    for name in ("cli.mend_streams", "ends.end_at_signals"):
        monkeypatch.setattr(f"pixelflow_jax.common.{name}", lambda: None)
    cli.run(lambda: sys.exit("error: image 3 is not finite"))
    assert left == [1]
    assert "image 3" in capsys.readouterr().err


@pytest.mark.parametrize("patient", [True, False])
def test_alone_and_patient(patient, monkeypatch):
    """Catches a long batch of one process that the watchdog takes for a process that hangs."""
    ended = []
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self, verdict: ended.append(verdict))
    monkeypatch.setattr(watchdog, "BEAT", 0.05)
    timeouts = ConfigDict(dict(start_timeout=1.0, step_timeout=0.1, heartbeat_timeout=1.0))
    with watchdog.joined(timeouts, patient=patient) as watch:
        watch("one batch")
        time.sleep(1.0)
    assert bool(ended) is not patient


def test_what_a_killed_write_left_does_not_count(tmp_path):
    """Catches a new folder that is refused for good after a SIGKILL in its first write."""
    (tmp_path / ".config.json.12.abc.tmp").write_text("{")
    assert files.list_files(tmp_path) == []


def test_import_is_quick_and_lean():
    """Catches an import of torch, TensorFlow or Gradio, or of JAX before it is needed."""
    code = (
        "import sys, pixelflow_jax as pf; heavy = {'torch', 'tensorflow', 'gradio', 'jax'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "[getattr(pf, name) for name in pf.__all__];"
        "assert not {'torch', 'tensorflow', 'gradio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_images_that_are_not_finite(trained, tmp_path, solver, monkeypatch):
    """Catches black pictures in place of an error, from broken weights or a solver that gives up."""
    load = job.load_params

    def broken(*args):
        params, config, meta = load(*args)
        return jax.tree.map(lambda x: x * np.nan, params), config, meta

    monkeypatch.setattr(job, "load_params", broken)
    flags = [f"--checkpoint={trained}", f"--out={tmp_path / 'out'}", "--labels=3", f"--solver={solver}"]
    with pytest.raises(SystemExit, match="image 0 is not finite"):
        sample.main([*flags, "--num_steps=1"])
    assert not list((tmp_path / "out").glob("*.png"))
