"""Compiled programs on disk: a second start does not compile, and no harm comes from the folder."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from bucket import Bucket

HERE = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def start(trained, tmp_path):
    """A function that starts `sample`: with an output folder, flags and variables."""

    def start(out, *flags, **more):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        env = {**kept, "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", **more}
        command = [sys.executable, "-m", "pixelflow_jax.sample", f"--checkpoint={trained}"]
        command += [f"--out={tmp_path / out}", "--num_images=2", "--labels=1", *flags]
        return subprocess.Popen(
            command,
            env={**env, "PYTHONPATH": str(HERE)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )

    return start


def finished(process):
    """Return what it printed."""
    printed = process.communicate()[1]
    assert process.returncode == 0, printed
    return printed


def files(folder):
    return sorted(path for path in folder.rglob("*-cache"))


@pytest.mark.slow
def test_a_second_start_reads_what_the_first_compiled(start, tmp_path):
    """Catches a cache that is not found again, is used against the flag, or changes a pixel."""
    places = tmp_path / "cache", tmp_path / "other"
    finished(start("none", "--no_compile_cache"))
    finished(start("none_either", "--no_compile_cache", JAX_COMPILATION_CACHE_DIR=str(places[1])))
    assert not files(places[0]) and not places[1].exists()
    first = finished(start("a"))
    made = {path: path.stat().st_mtime_ns for path in files(places[0])}
    (largest,) = (path for path in made if "generate" in path.name)
    assert "pixelflow_jax" in str(largest)
    used = largest.with_name(largest.name.removesuffix("-cache") + "-atime")  # JAX notes each use
    before = used.read_bytes()
    second = finished(start("b"))
    assert used.read_bytes() != before and largest.stat().st_mtime_ns == made[largest]
    assert "Compiling the sampler" in first and "Compiled in" in second
    finished(start("c", JAX_COMPILATION_CACHE_DIR=str(places[1])))
    assert [*places[1].iterdir()]
    pixels = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("none", "a", "b", "c")]
    assert all((x == pixels[0]).all() for x in pixels)


@pytest.mark.slow
def test_a_bad_cache_does_no_harm(start, tmp_path):
    """Catches two processes that tear each other's files, half a file, and a folder without space."""
    pair = [start("a"), start("b")]
    for process in pair:
        finished(process)
    for path in files(tmp_path / "cache"):
        path.write_bytes(path.read_bytes()[:100])
    printed = finished(start("c"))
    assert "Traceback" not in printed
    assert "Traceback" not in finished(start("d", XDG_CACHE_HOME="/proc/nowhere"))
    if os.path.exists("/dev/full"):
        link = tmp_path / "full" / "pixelflow_jax"
        link.mkdir(parents=True)
        (link / "programs").symlink_to("/dev/full")  # where nothing can be written
        assert "Traceback" not in finished(start("e", XDG_CACHE_HOME=str(tmp_path / "full")))
    pixels = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "abcd"]
    assert all((x == pixels[0]).all() for x in pixels)


@pytest.mark.slow
def test_a_bucket_keeps_programs(start):
    """Catches a bucket that is not read again, and one whose refusal ends the command."""
    with Bucket() as bucket:
        place = {"JAX_COMPILATION_CACHE_DIR": f"{bucket.url}/programs"}
        finished(start("a", **place))
        (made,) = (name for name in bucket.names("programs/") if "generate" in name)
        with bucket.count(made) as asked:
            finished(start("b", **place))
        assert asked and {method for method, _ in asked} == {"GET"}
        bucket.status, bucket.refuse = 403, lambda method, path: True
        assert "Traceback" not in finished(start("c", **place))
