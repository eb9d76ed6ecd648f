"""One process at a time in a folder: kernel locks, leases, and the commands that take them."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import pixelflow_jax as pf
from pixelflow_jax import doctor, encode, evaluate, pack, sample
from pixelflow_jax.common import Lost, UserError, files, locks
from pixelflow_jax.training.start import claimed_workdir

from conftest import TINY

HOLD = """import sys, time
from pixelflow_jax.common import locks
with locks.held(sys.argv[1], '--x'):
    print(1, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def leases(monkeypatch):
    """A disk without locks, as some mounts are, and short times."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    for name, seconds in (("RENEW", 0.05), ("STALE", 1.0), ("LOOK", 0.1)):
        monkeypatch.setattr(locks, f"{name}_SECONDS", seconds)


def hold(folder) -> subprocess.Popen:
    """A process that holds a folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )
    child.stdout.readline()
    return child


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_lock_ends_with_its_process(tmp_path, stop):
    """Catches two runs in one workdir, and a resume that a dead process's lock stops."""
    folder = tmp_path / "new" / "run"
    child = hold(folder)
    for _ in range(2):
        with pytest.raises(UserError, match=f"--x={folder} is in use by process {child.pid} on "):
            locks.held(folder, "--x").__enter__()
        assert f"process {child.pid}" in locks.holder(folder)
    assert files.list_files(folder) == []
    child.send_signal(stop)
    child.wait()
    assert locks.holder(folder) is None
    begin = time.monotonic()
    with locks.held(folder, "--x") as check:
        check()
        assert time.monotonic() - begin < locks.STALE_SECONDS / 2
    assert list(folder.iterdir()) == [] and locks.holder(folder) is None


@pytest.mark.parametrize("kind", ["lock", "lease"])
def test_many_at_once(tmp_path, kind, request):
    """Catches a moment between the look and the taking, and a folder that stays held."""
    if kind == "lease":
        request.getfixturevalue("leases")
    inside, most, refused = [], [], []

    def one():
        for _ in range(20 if kind == "lock" else 1):
            try:
                with locks.held(tmp_path, "--x"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.002)
                    inside.pop()
            except UserError as error:
                refused.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and list(tmp_path.iterdir()) == [] and (most or refused)
    with locks.held(tmp_path, "--x"):
        pass


def test_leases(tmp_path, leases):
    """Catches, where there are no locks, a second run that is let in or a dead one that stays."""
    path = tmp_path / files.LOCK
    with locks.held(tmp_path, "--x") as check:
        time.sleep(0.2)
        check()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            locks.held(tmp_path, "--x").__enter__()
        left = json.loads(path.read_text())
        with pytest.raises(Lost, match="on far"):
            for _ in range(1000):  # until the lease is looked at again
                path.write_text(json.dumps(left | {"token": "another's", "host": "far"}))
                time.sleep(0.05)
                check()
    for renewed in (time.time() - 10, time.time(), time.time() + 1e5, "x"):  # of dead processes
        path.write_text(json.dumps(left | {"renewed": renewed}))
        with locks.held(tmp_path, "--x"):
            assert json.loads(path.read_text())["token"] != left["token"]
        assert not path.exists()
    for text in ("", "[", "[]", "{}", "\xff"):
        path.write_text(text)
        with locks.held(tmp_path, "--x"):
            pass


def test_runs_and_the_doctor_keep_out(tmp_path, trained, capsys):
    """Catches metrics of two runs in one file."""
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "run"))
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    child = hold(workdir)
    longer = pf.load_config("configs/digits.py", (*TINY, "num_train_steps=6"))
    with pytest.raises(UserError, match=f"--workdir={workdir} is in use by process {child.pid}"):
        pf.fit(longer, workdir)
    with pytest.raises(SystemExit):
        doctor.main(["--no_compile", f"--workdir={workdir}", *(f"--config.{entry}" for entry in TINY)])
    assert f"FAIL  workdir   {workdir} is in use by process {child.pid}" in capsys.readouterr().out
    child.kill()
    child.wait()
    (workdir / files.LOCK).unlink()
    assert before == {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("first", "then"), [("a", "a"), ("a", "b"), ("", "b"), ("a", "")])
def test_a_run_that_has_begun_keeps_its_start(tmp_path, tiny_config, first, then, capsys):
    """Catches a flag that is ignored without a word, and a config.json that tells of another start."""
    data = {"examples": 1, "digest": "", "classes": {}}

    def claim(init_from):
        config = tiny_config.copy_and_resolve_references()
        config.init_from = init_from
        with claimed_workdir(tmp_path, config, data):
            kept = files.read_json(tmp_path / "config.json")["init_from"]
        assert kept == config.init_from
        return kept

    assert [claim("other"), claim(first)] == ["other", first]  # no checkpoint yet
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert capsys.readouterr().err == ""
    assert claim(then) == first
    said = capsys.readouterr().err
    assert (f"config.init_from={then} is not read" in said) == bool(then) == (said.count("\n") == 1)
    assert ("it began from" in said) == (then not in ("", first))


@pytest.mark.parametrize("name", ["sample", "pack", "encode", "sweep"])
def test_output_folders_keep_out(name, trained, t5_folder, tmp_path):
    """Catches two commands that complete one folder together."""
    out = tmp_path / "out"
    (tmp_path / "captions").write_text("a red two\n")
    texts = f"--captions={tmp_path / 'captions'}"
    run = {
        "sample": lambda: sample.main([f"--checkpoint={trained}", f"--out={out}", "--num_images=1"]),
        "pack": lambda: pack.main(["--source=idx", f"--path={digits(tmp_path)}", f"--out={out}"]),
        "encode": lambda: encode.main([texts, f"--encoder={t5_folder}", f"--out={out}"]),
        "sweep": lambda: evaluate.main(
            ["--sweep", f"--checkpoint={trained}", f"--reference={numbers(tmp_path)}", "--features=pca",
             f"--out={out}", "--num_images=4"]
        ),
    }[name]  # fmt: skip
    with locks.held(out, "--out"), pytest.raises(UserError, match=f"--out={out} is in use by process"):
        run()
    assert list(out.iterdir()) == []


def digits(folder) -> pathlib.Path:
    """A folder of MNIST's format."""
    for name, shape, data in (
        ("train-images-idx3-ubyte", (2, 16, 16), bytes(512)),
        ("train-labels-idx1-ubyte", (2,), bytes(2)),
    ):
        head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        (folder / name).write_bytes(head + data)
    return folder


def numbers(folder) -> pathlib.Path:
    """A few pictures as an npz."""
    import numpy as np

    path = folder / "reference.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8))
    return path
