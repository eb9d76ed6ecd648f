"""Many devices and processes: the same results as with one, and every large array is sharded."""

import dataclasses
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from pixelflow_jax.common import UserError
from pixelflow_jax.config import load_config
from pixelflow_jax.distributed import sharding
from pixelflow_jax.distributed.sharding import P, make_mesh, param_spec
from pixelflow_jax.training import loop

from conftest import start_hosts, with_devices

HERE = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((HERE.parent / "configs").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def results():
    """Return the output of eight_devices.py."""
    child = subprocess.run(
        [sys.executable, HERE / "eight_devices.py"], capture_output=True, text=True, cwd=HERE.parent
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["data", "fsdp", "mixed", "context", "all", "accumulated", "mixed_accumulated"]
)
def test_every_mesh_gives_the_losses_of_one_device(results, name):
    """Catches gradients summed twice or never, and noise or stages that depend on the device."""
    np.testing.assert_allclose(results[name]["losses"], results["one"]["losses"], rtol=1e-5)
    assert results[name]["traces"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["context", "all", "mixed_accumulated"])
def test_every_mesh_distils_as_one_device(results, name):
    """Catches targets that depend on the device, a teacher or an average gathered wrongly."""
    ours, theirs = (results[f"distilled_{mesh}"] for mesh in (name, "one"))
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-5)
    assert ours["traces"] == 1


@pytest.mark.slow
def test_muon_on_a_mesh_is_muon_on_one_device(results):
    """Catches a shard of a matrix that is orthogonalized by itself, and a replicated momentum."""
    ours, theirs = (results[f"muon_{name}"] for name in ("mixed_accumulated", "one"))
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-5)
    momenta = [x for name, x in ours["shares"].items() if "muon/inner_state" in name]
    assert momenta and set(momenta) == {1 / 2}


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "ab2", "dopri5"])
def test_eight_devices_make_the_images_of_one(results, solver):
    """Catches noise or steps that depend on an image's device."""
    assert results["sampling"][solver] < 1e-5


@pytest.mark.slow
def test_devices_that_share_an_image_make_the_same(results):
    """Catches a sampler that loses or swaps the tokens of devices along `context`."""
    assert results["shared_sampling"] <= 1  # of 255: rounding


@pytest.mark.slow
def test_bfloat16_and_remat_under_fsdp(results):
    """Catches a gather in the wrong dtype, or a backward pass that does not gather again."""
    np.testing.assert_allclose(
        results["bfloat16_fsdp"]["losses"], results["bfloat16"]["losses"], rtol=1e-3
    )
    for name in ("remat_fsdp", "offload_fsdp", "remat_context"):
        np.testing.assert_allclose(results[name]["losses"], results["one"]["losses"], rtol=1e-5)


@pytest.mark.slow
def test_fsdp_holds_an_eighth_of_every_large_array(results):
    """Catches a parameter, moment or average that is replicated."""
    shares = results["fsdp"]["shares"]
    assert set(shares.values()) == {1 / 8}
    for part in ("params/", "opt_state/adamw", "opt_state/ema"):
        assert any(name.startswith(part) for name in shares), part
    assert set(results["mixed"]["shares"].values()) == {1 / 4}
    assert set(results["data"]["shares"].values()) == {1.0}


@pytest.mark.slow
def test_collectives_of_a_step_are_those_written_down(results):
    """Catches a gather that is kept or repeated, and a parser that miscounts loops.

    Layers are gathered in the forward and again in the backward pass, the rest once; every gradient
    is summed once.
    """
    ours = results["remat_fsdp"]
    found = ours["collectives"]
    assert found["all-to-all"]["ops"] == found["collective-permute"]["ops"] == 0
    expected = ours["bytes"] + ours["block_bytes"]
    assert 0.9 * expected < found["all-gather"]["bytes"] < 1.02 * expected
    assert 0.9 < found["reduce-scatter"]["bytes"] / ours["bytes"] <= 1
    assert found["all-reduce"]["bytes"] / ours["bytes"] < 0.2  # vectors, norms
    assert results["one"]["collectives"]["all-gather"]["bytes"] == 0


def test_param_specs():
    """Catches sharding of the layer axis, of a vector, or of an indivisible dimension."""
    assert param_spec("params/blocks/q/kernel", (28, 1152, 1152), 16) == P(None, "fsdp")
    assert param_spec("params/class_embed/embedding", (1001, 1152), 16) == P(None, "fsdp")
    assert param_spec("opt_state/adamw/mu/blocks/q/bias", (32, 1152), 16) == P()
    assert param_spec("params/head/kernel", (1152, 48), 1) == P()
    assert param_spec("params/odd", (7, 9), 4) == P()


def test_meshes_that_do_not_fit():
    """Catches a run that silently leaves devices idle."""
    devices = jax.devices()[:1]
    assert dict(make_mesh(-1, 1, devices).shape) == {"data": 1, "fsdp": 1, "context": 1}
    for sizes in ((2, 1), (1, 2), (-1, 2), (3, -1)):
        with pytest.raises(UserError, match="do not fit 1 devices"):
            make_mesh(*sizes, devices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes that a mesh needs of a device."""

    id: int
    platform: str
    device_kind: str
    slice_index: int
    process_index: int
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def tpu(kind: str, dims: tuple[int, int, int], slices: int) -> list[Chip]:
    """Return the devices of slices in JAX's order; v3 has two cores per chip, a host has four chips."""
    cores = range(2 if kind == "TPU v3" else 1)
    places = list(itertools.product(range(slices), *map(range, dims[::-1]), cores))
    return [
        Chip(i, "tpu", kind, part, i // (4 * len(cores)), (x, y, z), core)
        for i, (part, z, y, x, core) in enumerate(places)
    ]


def gpus(nodes: int, per_process: int = 8) -> list[Chip]:
    """Return nodes of eight GPUs, each a slice to JAX, in shuffled order."""
    found = [Chip(i, "gpu", "NVIDIA H100", i // 8, i // per_process) for i in range(8 * nodes)]
    return found[::-1]


SLICES = [
    *(("TPU v5 lite", (*dims, 1)) for dims in [(2, 2), (2, 4), (4, 4), (4, 8), (8, 16), (16, 16)]),
    *(("TPU v5p", dims) for dims in [(2, 2, 1), (2, 2, 2), (2, 2, 4), (4, 4, 4), (4, 4, 8), (8, 8, 8)]),
    ("TPU v4", (2, 2, 2)),
    ("TPU v4", (4, 4, 4)),
    ("TPU v3", (4, 4, 1)),
    ("TPU v6 lite", (4, 4, 1)),
]


def mesh_or_advice(sizes: tuple[int, int, int], devices: list[Chip]):
    """Return the mesh; if the sizes do not fit, that of the sizes suggested by the error."""
    data, fsdp, context = sizes
    try:
        return make_mesh(data, fsdp, devices, context)
    except UserError as error:
        named = dict(re.findall(r"--config.mesh.(\w+)=(-?\d+)", str(error).split("What fits:")[1]))
        fsdp, context = int(named["fsdp"]), int(named.get("context", context))
        return make_mesh(int(named["data"]), fsdp, devices, context)


MESHES = sorted(
    {(m.data, m.fsdp, m.context) for m in (load_config(str(path)).mesh for path in CONFIGS)}
    | {(-1, 8, 4), (-1, 3, 1), (1, -1, 4), (-1, 16, 2), (2, 8, 4), (-1, 1, 5)}
)


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_fits_tpu_slices_or_says_what_does(sizes, slices):
    """Catches a traceback for an axis over a part of the torus, and fsdp between slices."""
    for kind, dims in SLICES:
        devices = tpu(kind, dims, slices)
        mesh = mesh_or_advice(sizes, devices)
        assert set(mesh.devices.flat) == set(devices)
        for inner in mesh.devices.reshape(slices, -1):  # data is the outer axis
            assert len({device.slice_index for device in inner}) == 1


@pytest.mark.parametrize("nodes", [1, 2, 16])
@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_fits_gpu_nodes_or_says_what_does(sizes, nodes):
    """Catches nodes taken for slices, and a group spread over several nodes although one suffices."""
    for devices in (gpus(nodes), gpus(nodes, per_process=1)):
        mesh = mesh_or_advice(sizes, devices)
        assert set(mesh.devices.flat) == set(devices)
        for name, axis in (("data", 0), ("context", -1)):
            group = mesh.devices.reshape((mesh.shape[name], -1)[:: 1 if axis == 0 else -1])
            if 8 % group.shape[1] == 0:
                assert all(len({device.slice_index for device in row}) == 1 for row in group)
    assert dict(make_mesh(1, -1, gpus(nodes)).shape) == {"data": 1, "fsdp": 8 * nodes, "context": 1}


def test_local_rows_are_all_rows_of_one_process():
    """Catches rows loaded twice when a batch is on several devices of one process."""
    where = jax.sharding.NamedSharding(make_mesh(-1, 1), sharding.BATCH)
    np.testing.assert_array_equal(sharding.local_rows(where, 8), np.arange(8))


def start_cluster(workdir, flags, processes=2, devices=2):
    """Start `train` as several processes with several devices each."""
    command = ["pixelflow_jax.train", f"--workdir={workdir}", *flags]
    return start_hosts(processes, command, lambda index: with_devices(devices))


def finish(children) -> list[str]:
    outputs = [child.communicate(timeout=600)[0] for child in children]
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output[-3000:]
    return outputs


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_as_one(tmp_path, tiny_flags):
    """Catches data loaded twice or in another order by a second host, and a checkpoint that only the
    same number of processes can read."""
    flags = [*tiny_flags, "--config.batch_size=32", "--config.log_every=1", "--config.mesh.fsdp=2"]
    flags += ["--config.num_train_steps=10", "--config.checkpoint_every=6"]
    flags += ["--config.optimizer.schedule=constant", "--config.sample.num_images=6"]
    flags += ["--config.sample_every=10"]
    outputs = finish(start_cluster(tmp_path / "run", flags))
    assert "Trained steps 0 to 10" in outputs[0] and "Trained" not in outputs[1]
    assert (tmp_path / "run" / "samples" / "10.png").exists()

    overrides = [flag.removeprefix("--config.") for flag in flags if "mesh" not in flag]
    config = load_config("configs/digits.py", overrides)
    config.num_train_steps = 12
    loop.train(config, tmp_path / "alone")
    loop.train(config, tmp_path / "run")
    _flip_a_bit(tmp_path / "run" / "checkpoints" / "12" / "params")
    outputs = finish(start_cluster(tmp_path / "run", [*flags, "--config.num_train_steps=13"]))
    assert "checkpoint 12 in" in outputs[0] and "Resuming from step 10" in outputs[0]
    losses = [
        [json.loads(row)["loss"] for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "alone")
    ]
    assert len(losses[0]) == 13
    np.testing.assert_allclose(losses[0][:12], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_is_read_once_for_all_copies(tmp_path):
    """Catches replicas that each read the checkpoint, and bits that change in transfer, such as -0.0."""
    env = with_devices(2) | {"PYTHONPATH": str(HERE)}
    children = start_hosts(2, ["replicas", str(tmp_path / "run")], lambda index: env)
    found = [json.loads(output.splitlines()[-1]) for output in finish(children)]
    for mesh in found[0]:
        assert all(process[mesh]["same"] and process[mesh]["step"] == 3 for process in found), mesh
        read = [process[mesh]["read"] for process in found]
        copies_apart = mesh in ("(4, 1, 1)", "(2, 2, 1)", "(1, 1, 4)", "(2, 1, 2)")
        assert (read[1] < read[0] / 4) == copies_apart, (mesh, read)


def _flip_a_bit(folder):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_a_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path, tiny_flags):
    """Catches hosts that save different steps, or one that waits forever for another."""
    workdir = tmp_path / "run"
    flags = [*tiny_flags, "--config.num_train_steps=100000", "--config.checkpoint_every=50000"]
    children = start_cluster(workdir, flags)
    metrics, end = workdir / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert all(child.poll() is None for child in children) and time.monotonic() < end
        time.sleep(0.1)
    children[1].send_signal(signal.SIGTERM)
    outputs = [child.communicate(timeout=600)[0] for child in children]
    assert [child.returncode for child in children] == [75, 75], outputs
    assert len(list((workdir / "checkpoints").iterdir())) == 1
