"""Low-rank adapters: training, resuming, many devices, sampling, merging."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import pixelflow_jax as pf
from pixelflow_jax import convert, sample, train
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models import lora
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.training.checkpoints import load_any, load_params, save_params
from pixelflow_jax.training.optimizer import build_optimizer
from pixelflow_jax.training.step import abstract_trained, init_state, make_loss_and_grads

from conftest import TINY, calm

HERE = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint to adapt."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    config = load_config("digits", TINY)
    save_params(folder, calm(build_model(config)), config)
    return folder


def flags(base, run, *more):
    entries = [*TINY, f"init_from={base}", "lora.rank=2", "optimizer.schedule=constant", *more]
    return ["--config=digits", f"--workdir={run}", *(f"--config.{entry}" for entry in entries)]


def leaves(tree):
    return {"/".join(path): np.asarray(x) for path, x in flatten_dict(tree).items()}


def test_fresh_adapters_change_nothing(noisy_params):
    """Catches adapters on the wrong matrices, or that are not zero at first; and merging that is off."""
    model = build_model(load_config("t2i_tiny", ["model.depth=2"]))
    params = noisy_params(model)
    fresh = lora.init_adapters(model, 4, 0)
    names = {path[-2] for path in flatten_dict(fresh)}
    assert names == {"q", "k", "v", "o", "mlp_1", "mlp_2"}
    assert {path[1] for path in flatten_dict(fresh)} >= {"self_attention", "cross_attention"}
    same = lora.merged(params, fresh)
    assert all((x == leaves(params)[name]).all() for name, x in leaves(same).items())

    adapters = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape) * 0.1, fresh)
    changed, pairs = leaves(lora.merged(params, adapters, 0.5)), leaves(adapters)
    for name, was in leaves(params).items():
        pair = [pairs.get(f"{name.removesuffix('/kernel')}/lora_{x}") for x in "ab"]
        wanted = was if pair[0] is None else was + 0.5 * np.einsum("dir,dro->dio", *pair)
        np.testing.assert_allclose(changed[name], wanted, atol=1e-6)


@pytest.mark.parametrize(("name", "rank", "share"), [("t2i_tiny", 4, 0.03), ("imagenet256_xl", 8, 0.01)])
def test_adapters_are_small(name, rank, share):
    """Catches adapters that hold more than what makes them worth having."""
    model = build_model(load_config(name))
    count = [
        sum(x.size for x in jax.tree.leaves(tree))
        for tree in (lora.abstract_adapters(model, rank), abstract_params(model))
    ]
    assert count[0] < share * count[1]


def test_gradients_are_those_through_the_merged_weights(tiny_config, noisy_params):
    """Catches a gradient of the wrong matrix, scale or sum over accumulation steps."""
    tiny_config.init_from, tiny_config.lora.rank = "x", 2
    model, mesh = build_model(tiny_config), sharding.make_mesh(devices=jax.devices()[:1])
    params = noisy_params(model)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32) * 0.1,
        abstract_trained(tiny_config, model),
    )
    rng, size = np.random.default_rng(2), tiny_config.batch_size
    batch = {"image": rng.integers(0, 256, (size, 16, 16, 3), np.uint8)}
    batch["labels"] = rng.integers(0, 10, size).astype(np.int32)
    key = jax.random.key(3)
    _, grads = jax.jit(make_loss_and_grads(tiny_config, model, mesh))(
        adapters, batch, key, {"base": params}
    )
    tiny_config.accumulation_steps = 2
    _, parts = jax.jit(make_loss_and_grads(tiny_config, model, mesh))(
        adapters, batch, key, {"base": params}
    )
    tiny_config.lora.rank, tiny_config.accumulation_steps = 0, 1
    _, whole = jax.jit(make_loss_and_grads(tiny_config, model, mesh))(
        lora.merged(params, adapters), batch, key
    )
    whole, pairs, parts = leaves(whole), leaves(adapters), leaves(parts)
    for name, found in leaves(grads).items():
        stem, _, kind = name.rpartition("/")
        a, b, full = pairs[f"{stem}/lora_a"], pairs[f"{stem}/lora_b"], whole[f"{stem}/kernel"]
        wanted = np.einsum("dio,dro->dir", full, b) if kind == "lora_a" else None
        wanted = np.einsum("dir,dio->dro", a, full) if wanted is None else wanted
        np.testing.assert_allclose(found, wanted, atol=1e-6 + 1e-4 * np.abs(wanted).max())
        np.testing.assert_allclose(parts[name], found, atol=1e-6 + 1e-4 * np.abs(found).max())


def test_a_run_of_adapters(base, tmp_path, capsys):
    """Catches checkpoints with more than adapters, another resume, a base that changes, lost names."""
    train.main(flags(base, tmp_path / "whole"))
    whole, config, meta = load_any(tmp_path / "whole", 0)
    assert config.lora.rank == 2 and len(meta["base_sha256"]) == 64
    assert {path[-1] for path in flatten_dict(whole)} == {"lora_a", "lora_b"}
    assert any(x.any() for name, x in leaves(whole).items() if name.endswith("lora_b"))
    assert (tmp_path / "whole" / "checkpoints" / "4").is_dir()

    train.main(flags(base, tmp_path / "part", "num_train_steps=2"))
    moved = shutil.copytree(base, tmp_path / "moved")
    train.main(flags(moved, tmp_path / "part"))
    again = leaves(load_any(tmp_path / "part", 0)[0])
    assert all((again[name] == x).all() for name, x in leaves(whole).items())
    params, its, _ = load_params(base)
    save_params(tmp_path / "other", jax.tree.map(lambda x: x * 1.01, params), its)
    with pytest.raises(UserError, match="holds other weights"):
        train.main(flags(tmp_path / "other", tmp_path / "part", "num_train_steps=6"))

    with pytest.raises(UserError, match="holds adapters only.*add --lora="):
        sample.main([f"--checkpoint={tmp_path / 'whole'}", f"--out={tmp_path / 'x'}"])
    with pytest.raises(UserError, match="belongs to .*sha256 .* not to --checkpoint"):
        pf.load(tmp_path / "other", lora=tmp_path / "whole")
    with pytest.raises(UserError, match="holds no adapters"):
        pf.load(base, lora=base)

    given = [f"--lora={tmp_path / 'whole'}", "--labels=3", "--num_images=2", "--ema=0"]
    sample.main([f"--checkpoint={base}", f"--out={tmp_path / 'out'}", *given])
    made = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    asked = dict(labels=[3], num_images=2)
    np.testing.assert_array_equal(pf.load(base, 0, lora=tmp_path / "whole").sample(**asked), made)
    plain = pf.load(base).sample(**asked)
    assert (plain != made).any()
    nothing = pf.load(base, lora=tmp_path / "whole", lora_scale=0.0).sample(**asked)
    np.testing.assert_array_equal(nothing, plain)

    save_params(tmp_path / "named", params, its, {"3": "three", "11": "eleven"})
    to = [f"--lora={tmp_path / 'whole'}", f"--out={tmp_path / 'merged'}"]
    convert.main([f"--source={tmp_path / 'named'}", *to])
    applied = pf.load(base, lora=tmp_path / "whole").params
    merged, _, meta = load_params(tmp_path / "merged")
    assert meta["classes"] == {**{str(x): str(x) for x in range(10)}, "11": "eleven"}
    for name, x in leaves(merged).items():
        np.testing.assert_allclose(x, leaves(applied)[name], atol=1e-6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["lora.rank=0", "init_from="], None),
        (["lora.rank=-1"], "lora.rank must"),
        (["lora.rank=17"], "larger than a side of"),
        (["init_from="], "needs config.init_from"),
        (["init_from=nowhere"], "no such file or folder"),
        (["model.depth=3"], "does not fit config.model"),
        (["distill.teacher=x"], "init_from does nothing with config.distill.teacher"),
    ],
)
def test_bad_adapters(base, tmp_path, entries, message):
    """Catches a traceback, or a run that trains something else than was asked for."""
    if message is None:
        train.main(flags(base, tmp_path / "run", *entries, "num_train_steps=1"))
        assert load_params(tmp_path / "run")[1].lora.rank == 0
        return
    with pytest.raises(UserError, match=message):
        train.main(flags(base, tmp_path / "run", *entries))
    assert not (tmp_path / "run" / "checkpoints").exists()


CHILD = """
import jax, sys
from pixelflow_jax import train
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["mesh.data=8", "mesh.fsdp=8", "mesh.fsdp=4"])
def test_eight_devices_agree_with_one(base, tmp_path, mesh):
    """Catches shards of the frozen weights that receive another part of the adapters."""
    more = ["batch_size=16", "sample_every=4"]
    train.main(flags(base, tmp_path / "one", *more))
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    env["PYTHONPATH"] = str(HERE)
    command = [sys.executable, "-c", CHILD, *flags(base, tmp_path / "eight", *more, mesh)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr[-2000:]
    one, eight = (leaves(load_any(tmp_path / name, 0)[0]) for name in ("one", "eight"))
    for name, x in one.items():
        np.testing.assert_allclose(eight[name], x, atol=2e-5 * max(np.abs(x).max(), 1))
    losses = [
        [json.loads(line)["loss"] for line in open(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "eight")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_optimizers_take_adapters(tiny_config):
    """Catches Muon or weight decay that cannot handle the adapters' names and shapes."""
    tiny_config.init_from, tiny_config.lora.rank = "x", 2
    model = build_model(tiny_config)
    for name in ("adamw", "muon"):
        tiny_config.optimizer.name, tiny_config.optimizer.weight_decay = name, 0.1
        optimizer = build_optimizer(tiny_config)
        params = lora.init_adapters(model, 2, 0)
        state = init_state(params, optimizer)
        grads = jax.tree.map(jnp.ones_like, params)
        updates, _ = optimizer.update(grads, state.opt_state, params)
        assert all(np.isfinite(x).all() and x.any() for x in jax.tree.leaves(updates))
