"""The doctor: alone, and on hosts that compare notes."""

import os
import pathlib
import re
import shutil

import pytest

from pixelflow_jax import doctor
from pixelflow_jax.config import load_config

from conftest import start_hosts

ROOT = pathlib.Path(__file__).parents[2]


def test_doctor(tmp_path, tiny_flags, capsys):
    """Catches a doctor that leaves traces, calls the sick well or dies of the disease."""
    flags = [*tiny_flags, "--no_compile", f"--workdir={tmp_path / 'a' / 'run'}"]
    doctor.main(flags)
    said = capsys.readouterr().out
    assert "all is well" in said and "FAIL" not in said
    assert re.search(r"ok +data +1,347 examples", said) and list(tmp_path.iterdir()) == []

    (tmp_path / "file").touch()
    bad = [*flags, f"--workdir={tmp_path / 'file' / 'run'}", "--config.data.source=folder"]
    with pytest.raises(SystemExit) as end:
        doctor.main([*bad, f"--config.data.path={tmp_path / 'none'}", "--config.mesh.fsdp=7"])
    said = capsys.readouterr().out
    assert end.value.code == 1 and "4 of 9 checks failed: batch, data, workdir, clock" in said
    for name in ("batch", "data", "workdir", "clock"):
        assert re.search(rf"FAIL +{name}", said), said


def test_doctor_sees_what_train_would_refuse(trained, tmp_path, tiny_flags, capsys):
    """Catches "all is well" for a workdir of another run, or a start that is not there."""
    for flags, said in (
        ([f"--workdir={trained}", "--config.model.depth=1"], "holds a run of another config"),
        ([f"--workdir={tmp_path}", "--config.init_from=/nowhere"], "no such file or folder"),
    ):
        with pytest.raises(SystemExit):
            doctor.main([*tiny_flags, "--no_compile", *flags])
        assert re.search(f"FAIL +workdir .*{said}", capsys.readouterr().out)
    doctor.main([*tiny_flags, "--no_compile", f"--workdir={trained}"])
    assert "it holds this run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source", ["folder", "caption_folder", "webdataset", "array_record", "idx", "tfds", "tfds mnist"]
)
def test_the_doctor_says_which_data_are_not_there(source, tmp_path, tiny_flags, capsys):
    """Catches a library's words about formats where a folder is missing, or a dataset in it."""
    source, _, name = source.partition(" ")
    flags = [*tiny_flags, "--no_compile", f"--workdir={tmp_path / 'run'}", f"--config.data.name={name}"]
    missing = [tmp_path / "none"] if not name else [tmp_path / "none", tmp_path]
    for path in missing:
        with pytest.raises(SystemExit):
            doctor.main([*flags, f"--config.data.source={source}", f"--config.data.path={path}"])
        said = capsys.readouterr().out
        assert re.search(r"FAIL +data .*(none is not there|there is no .*/mnist/)", said), said


@pytest.mark.parametrize("name", [*doctor.FOLDERS, *doctor.FILES])
def test_the_doctor_tries_all_that_training_writes(trained, tmp_path, tiny_flags, capsys, name):
    """Catches "all is well" where checkpoints, samples or metrics cannot be written."""
    run = pathlib.Path(shutil.copytree(trained, tmp_path / "run"))
    bad = run / name
    if name in doctor.FILES:  # the other kind stands in the way, as root may write anything
        bad.unlink(missing_ok=True)
        bad.mkdir()
    else:
        shutil.rmtree(bad, ignore_errors=True)
        bad.touch()
    with pytest.raises(SystemExit):
        doctor.main([*tiny_flags, "--no_compile", f"--workdir={run}"])
    said = capsys.readouterr().out
    assert re.search(rf"FAIL +workdir .*{name}", said), said


def test_hosts_that_share_a_new_workdir(tmp_path):
    """Catches a host that removes the folder which another has found and is about to write to."""
    workdir = tmp_path / "new" / "run"
    both = doctor.no_new_folders(str(workdir)), doctor.no_new_folders(str(workdir))
    with both[0], both[1]:  # they came before it was made
        with doctor.trial_file(workdir):
            pass
        assert workdir.exists()
    assert list(tmp_path.iterdir()) == []


def test_doctor_compares_memory_and_regions(tmp_path, tiny_flags, capsys, monkeypatch):
    """Catches an estimate that is not the compiled step's, and a bucket on another continent."""
    monkeypatch.setattr(doctor, "device_memory", lambda: 1000)
    with pytest.raises(SystemExit):
        doctor.main([*tiny_flags, f"--workdir={tmp_path / 'run'}"])
    assert re.search(
        r"FAIL +memory +a step needs 0.\d+ GiB.*accumulation_steps", capsys.readouterr().out
    )

    fake = tmp_path / "gcloud"
    fake.write_text("#!/bin/sh\necho EUROPE-WEST4\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor.epath, "Path", lambda path: pathlib.Path(tmp_path))
    config = load_config("configs/digits.py")
    for zone, fine in (("europe-west4-a", True), ("us-central2-b", False), (None, True)):
        monkeypatch.setattr(doctor, "this_zone", lambda zone=zone: zone)
        if fine:
            assert "europe-west4" in doctor.check_buckets("gs://b/run", config)
        else:
            with pytest.raises(
                doctor.Problem, match="gs://b/run is in europe-west4, this machine in us"
            ):
                doctor.check_buckets("gs://b/run", config)
    near = ["europe-west4", "eu", "eur4", "us-west4", "us", "nam4", "asia1"]
    assert [doctor.is_near(place, "europe-west4-a") for place in near] == [True] * 3 + [False] * 4
    assert doctor.is_near("nam4", "us-central2-b") and doctor.is_near("asia1", "asia-east1-c")


@pytest.mark.slow
def test_doctor_on_two_hosts(tmp_path, tiny_flags):
    """Catches hosts that end differently, so that the healthy ones hang, and folders left behind."""
    fake = tmp_path / "nvidia-smi"  # a GPU that JAX does not see
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    command = ["pixelflow_jax.doctor", *tiny_flags, "--no_compile"]
    command.append(f"--workdir={tmp_path / 'new' / 'run'}")
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for bad in (False, True):
        children = start_hosts(2, command, lambda index, bad=bad: path if bad and index else {})
        for child in children:
            output = child.communicate(timeout=300)[0]
            assert child.returncode == bad, output
            said = r"1 of 9 checks failed on process 1 \(.*\): devices\n" if bad else "all is well"
            assert re.search(said, output) and "2 agree on code" in output, output
        assert not (tmp_path / "new").exists()
