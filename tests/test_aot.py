"""The train step compiled for a real TPU slice. Needs libtpu (the extra `aot`), in a venv of its own."""

import importlib.util
import json

import jax
import pytest

from pixelflow_jax import compile_check
from pixelflow_jax.aot.compiler import tpu_devices
from pixelflow_jax.common import UserError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[aot]'"
)


@needs_libtpu
@pytest.mark.parametrize(("remat", "most_gib"), [("full", 3.5), ("offload", 2.8)])
def test_the_schedule_of_the_class_model_is_clean(remat, most_gib, tmp_path, capsys):
    """Catches a resharding that the compiler puts in by itself, a gather in float32, a copied state.

    And a form of a layer that costs memory: sums without the axis of a single row, in bfloat16, took
    0.2 GiB.
    """
    path = tmp_path / "figures.json"
    flags = ["--config=configs/imagenet256_xl.py", "--topology=v5e:4x4", f"--json={path}"]
    compile_check.main([*flags, "--batch_per_chip=8", f"--config.model.remat={remat}"])
    print(capsys.readouterr().out)
    figures = json.loads(path.read_text())
    assert figures["collectives"]["all-to-all"]["ops"] == 0
    assert figures["collectives"]["collective-permute"]["ops"] == 0
    assert 1.5 < figures["gathered_per_parameter_byte"] <= 2.1
    assert 0.95 < figures["reduced_per_gradient_byte"] <= 1.05
    # float32 parameters, two moments and one average, a sixteenth of each
    state = 4 * 4 * figures["parameters"] / 16
    assert 1 <= figures["memory_per_device"]["arguments"] / state < 1.05
    assert figures["memory_per_device"]["peak"] < most_gib * 2**30


@needs_libtpu
def test_the_distillation_of_the_class_model_fits(tmp_path, capsys):
    """Catches a teacher that is replicated, and targets that the compiler reshards."""
    path = tmp_path / "figures.json"
    flags = ["--config=configs/imagenet256_xl_few.py", "--topology=v5e:4x4", f"--json={path}"]
    compile_check.main([*flags, "--batch_per_chip=8"])
    print(capsys.readouterr().out)
    figures = json.loads(path.read_text())
    for kind in ("all-to-all", "collective-permute"):
        assert figures["collectives"][kind]["ops"] == 0
    # twice each: the student, its average and the teacher
    assert 5 < figures["gathered_per_parameter_byte"] <= 6.1
    assert 0.95 < figures["reduced_per_gradient_byte"] <= 1.05
    # float32 parameters, two moments and one average, and the teacher in bfloat16: a sixteenth of each
    state = (4 * 4 + 2) * figures["parameters"] / 16
    assert 1 <= figures["memory_per_device"]["arguments"] / state < 1.05
    assert figures["memory_per_device"]["peak"] < 16 * 2**30


@needs_libtpu
def test_topologies_that_do_not_exist():
    """Catches a traceback from libtpu."""
    with pytest.raises(UserError, match="write it as v5e:4x4"):
        tpu_devices("v5e:3x5")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch_per_chip=0"], "--batch_per_chip must be at least 1"),
        (["--num_slices=-1"], "--num_slices must be at least 1"),
        (["--task=sample", "--config.sample.solver=dopri5"], "step_control=fixed"),
    ],
)
def test_what_cannot_be_compiled_is_said_at_once(flags, said, monkeypatch):
    """Catches a traceback, minutes later, for a cost that is not known before the images are."""
    monkeypatch.setattr(compile_check, "tpu_devices", lambda *args: jax.devices()[:1])
    with pytest.raises(UserError, match=said):
        compile_check.main(["--config=configs/digits.py", "--topology=v5e:1x1", *flags])


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    """Catches a traceback where libtpu is missing."""
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match="pip install"):
        tpu_devices("v5e:4x4")
