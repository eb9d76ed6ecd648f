"""Resuming after kills, signals, damage and full disks. Most runs are separate processes."""

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.distributed import sharding
from pixelflow_jax.distributed.preemption import Preempted
from pixelflow_jax.training import checkpoints, loop
from pixelflow_jax.training.checkpoints import CheckpointFailed
from pixelflow_jax.training.optimizer import build_optimizer
from pixelflow_jax.training.step import abstract_state

from conftest import TINY, with_devices

ROOT = pathlib.Path(__file__).parents[2]
RUN = (
    *TINY,
    "batch_size=16",
    "log_every=3",
    "checkpoint_every=4",
    "num_train_steps=30",
    "keep_checkpoints=3",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, with its losses and final state."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    state, _ = loop.train(load_config("configs/digits.py", RUN), workdir)
    return workdir, losses(workdir), jax.device_get(state)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run, to damage."""
    return pathlib.Path(shutil.copytree(whole[0], tmp_path / "run"))


def losses(workdir) -> list[tuple[int, float, float]]:
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def start(workdir, *more, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "pixelflow_jax.train", f"--workdir={workdir}"]
    command += [f"--config.{override}" for override in (*RUN, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


def wait_for(child, condition, seconds=120):
    """Wait until something is seen on disk; fail if the run ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def rows(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def is_saving(workdir) -> bool:
    return any("orbax-checkpoint-tmp" in p.name for p in workdir.glob("checkpoints/*"))


def test_killed_twice_it_ends_where_the_unkilled_run_does(whole, tmp_path):
    """Catches anything that a checkpoint leaves out, and a save that a kill can break."""
    workdir = kill_twice(tmp_path / "run")
    assert losses(workdir) == whole[1]
    assert_same_params(workdir, whole)


def kill_twice(workdir, *more):
    """Run to the end, with a SIGKILL in a save and one between two."""
    for condition in (lambda: is_saving(workdir), lambda: rows(workdir) >= 4):
        child = start(workdir, *more)
        wait_for(child, condition)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    child = start(workdir, *more)
    output = child.communicate(timeout=600)[0]
    assert child.returncode == 0 and "Resuming from step" in output, output
    return workdir


@pytest.mark.slow
def test_a_killed_student_ends_where_the_unkilled_one_does(whole, tmp_path):
    """Catches a teacher or an average of the student that a killed run reads otherwise."""
    more = [f"distill.teacher={whole[0]}", "sample.num_steps=1", "sample.guidance_scale=0"]
    workdir = kill_twice(tmp_path / "killed", *more)
    state, _ = loop.train(load_config("configs/digits.py", [*RUN, *more]), tmp_path / "whole")
    assert losses(workdir) == losses(tmp_path / "whole")
    assert_same_params(workdir, (None, None, jax.device_get(state)))


def assert_same_params(workdir, whole):
    params, _, meta = checkpoints.load_params(workdir, ema=0)
    assert meta["step"] == 30
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(whole[2].params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_sigterm_saves_and_exits_75(whole, tmp_path):
    """Catches a preemption that loses steps, or is taken for success or for a crash."""
    workdir = tmp_path / "run"
    child = start(workdir, "checkpoint_every=1000")
    wait_for(child, lambda: rows(workdir) >= 2)
    child.send_signal(signal.SIGTERM)
    output = child.communicate(timeout=300)[0]
    assert child.returncode == 75 and "start it again" in output, output
    state, report = loop.train(load_config("configs/digits.py", RUN), workdir)
    assert "steps 0" not in report
    assert losses(workdir) == whole[1]


DAMAGE = {
    "a file cut short": lambda folder: _largest(folder / "params").write_bytes(b"x" * 100),
    "a file gone": lambda folder: (folder / "optimizer" / "_METADATA").unlink(),
    "a flipped bit": lambda folder: _flip(_largest(folder / "params")),
    "no meta": lambda folder: shutil.rmtree(folder / "meta"),
}


def _largest(folder) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(copy, whole, kind, caplog):
    """Catches a run that fails on a damaged newest checkpoint, or resumes from it."""
    DAMAGE[kind](copy / "checkpoints" / "30")
    template, manager = template_and_manager(copy)
    with manager:
        state, meta = checkpoints.restore_newest(manager, template)
    assert int(state.step) == meta["step"] == 28
    assert "is damaged" in caplog.text and (copy / "damaged" / "30").is_dir()


def template_and_manager(workdir):
    config = load_config("configs/digits.py", RUN)
    model, optimizer = build_model(config), build_optimizer(config)
    template = abstract_state(config, model, optimizer, sharding.make_mesh())
    return template, checkpoints.open_manager(workdir)


def test_if_all_are_damaged_nothing_starts_afresh(copy):
    """Catches the silent restart (LTH14/JiT#66), also by a second start after the error."""
    for folder in (copy / "checkpoints").iterdir():
        DAMAGE["a file gone"](folder)
    before = (copy / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint in .* can be restored"):
            loop.train(load_config("configs/digits.py", RUN), copy)
    assert (copy / "metrics.jsonl").read_bytes() == before and not (copy / "damaged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, 8])
def test_resumed_on_other_devices_it_goes_on_alike(copy, whole, devices):
    """Catches a state that is tied to the mesh that saved it; losses agree to 1e-5."""
    for step in ("28", "30"):
        shutil.rmtree(copy / "checkpoints" / step)
    env = os.environ | with_devices(devices)
    child = start(copy, "mesh.fsdp=2", env=env)
    output = child.communicate(timeout=600)[0]
    assert child.returncode == 0 and "Resuming from step 24" in output, output
    np.testing.assert_allclose(losses(copy), whole[1], rtol=1e-5)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(tmp_path):
    """Catches a save that fails unseen (orbax#392, #605), or spoils the one before."""
    workdir = tmp_path / "run"
    config = load_config("configs/digits.py", [*RUN, "num_train_steps=4", "optimizer.schedule=constant"])
    loop.train(config, workdir)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    child = start(workdir, "optimizer.schedule=constant", preexec_fn=limit)
    output = child.communicate(timeout=600)[0]
    said = "error: a checkpoint could not be saved in .*File too large.* are kept\n$"
    assert child.returncode == 1 and re.search(said, output), output
    assert "Traceback" not in output, output
    assert checkpoints.load_params(workdir)[2]["step"] == 4


def test_a_failed_background_save_surfaces_at_the_next_step(tmp_path, tiny_config, monkeypatch):
    """Catches an asynchronous error that is never checked."""
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.check_background_save(manager)
        monkeypatch.setattr(
            ocp.CheckpointManager,
            "check_for_errors",
            lambda self: (_ for _ in ()).throw(OSError("quota")),
        )
        with pytest.raises(CheckpointFailed, match="quota"):
            checkpoints.check_background_save(manager)


def test_a_new_run_can_start_from_old_weights(whole, tmp_path):
    """Catches init_from that is ignored, takes another model's weights, or resumes the step count."""
    from pixelflow_jax import train

    flags = [
        f"--config.{override}" for override in (*TINY, "num_train_steps=1", f"init_from={whole[0]}")
    ]
    train.main([f"--workdir={tmp_path / 'new'}", *flags, "--config.optimizer.learning_rate=1e-20"])
    ours = checkpoints.load_params(tmp_path / "new", ema=0)[0]
    theirs = checkpoints.load_params(whole[0])[0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    by_hand = loop.prepare(load_config("digits", [*TINY, f"init_from={whole[0]}"]))[0].params
    jax.tree.map(np.testing.assert_array_equal, by_hand, theirs)
    with pytest.raises(UserError, match="does not fit config.model: blocks/"):
        train.main([f"--workdir={tmp_path / 'deep'}", *flags, "--config.model.depth=3"])
    heads = ["--config.model.num_heads=1", "--config.model.head_dim=16"]  # of the same shapes
    with pytest.raises(UserError, match="config.model.num_heads is 1, but that of config.init_from"):
        train.main([f"--workdir={tmp_path / 'heads'}", *flags, *heads])


def test_resume_does_not_need_init_from(whole, tmp_path):
    """Catches a Python call that ignores init_from, and a run that needs it to resume."""
    begin, workdir = shutil.copytree(whole[0], tmp_path / "begin"), tmp_path / "new"
    overrides = [*TINY, f"init_from={begin}", "optimizer.learning_rate=1e-20"]
    state, _ = loop.train(load_config("digits", [*overrides, "num_train_steps=1"]), workdir)
    theirs = checkpoints.load_params(begin)[0]
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    shutil.rmtree(begin)
    loop.train(load_config("digits", [*overrides, "num_train_steps=2"]), workdir)
    assert (workdir / "checkpoints" / "2").exists()


def test_a_stop_at_a_sampling_step_loses_no_grid(tmp_path, tiny_config, monkeypatch):
    """Catches samples that neither the stopped nor the resumed run draws."""
    tiny_config.update(num_train_steps=4, checkpoint_every=4, sample_every=2)
    loop.train(tiny_config, tmp_path / "whole")
    monkeypatch.setattr(loop.PreemptionWatch, "requested", lambda self, step: step == 2)
    with pytest.raises(Preempted):
        loop.train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()
    monkeypatch.undo()
    loop.train(tiny_config, tmp_path / "run")
    for name in ("2.png", "4.png"):
        drawn, expected = (tmp_path / run / "samples" / name for run in ("run", "whole"))
        assert drawn.read_bytes() == expected.read_bytes()


def test_what_sample_takes_for_the_newest(tmp_path, tiny_config, monkeypatch):
    """Catches an incomplete step in a bucket that is read, and hosts that read different steps."""
    tiny_config.update(num_train_steps=3, checkpoint_every=1, keep_checkpoints=3)
    loop.train(tiny_config, tmp_path)
    finalized = checkpoints.ocp.utils.is_checkpoint_finalized
    monkeypatch.setattr(
        checkpoints.ocp.utils,
        "is_checkpoint_finalized",
        lambda path: path.name != "3" and finalized(path),
    )
    assert checkpoints.load_params(tmp_path)[2]["step"] == 2
    monkeypatch.setattr(
        checkpoints.multihost_utils, "broadcast_one_to_all", lambda parts: parts - [0, 1]
    )
    assert checkpoints.load_params(tmp_path)[2]["step"] == 1


def test_what_is_kept(tmp_path, tiny_config):
    """Catches keep_checkpoints and keep_every that are swapped or ignored; two kinds of average."""
    tiny_config.update(num_train_steps=7, checkpoint_every=1, keep_checkpoints=2, keep_every=3)
    tiny_config.ema.half_lives, tiny_config.ema.warmup = (16.0,), False
    state, _ = loop.train(tiny_config, tmp_path)
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert steps == [3, 6, 7]
    first, second = (checkpoints.load_params(tmp_path, ema=ema)[0] for ema in (0.998, 16.0))
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
