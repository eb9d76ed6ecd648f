"""The train step and loop: determinism, one compilation, resume, corruption, divergence."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model
from pixelflow_jax.data.sources import load_source
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import init_params
from pixelflow_jax.training import loop, objective
from pixelflow_jax.training.checkpoints import load_params
from pixelflow_jax.training.loop import device_batches
from pixelflow_jax.training.metrics import TrainingDiverged
from pixelflow_jax.training.optimizer import build_optimizer, build_schedule
from pixelflow_jax.training.step import init_state, make_train_step


def run_steps(config, count):
    """Return (state, losses, number of traces of the step) after `count` steps."""
    model, optimizer = build_model(config), build_optimizer(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    state = init_state(init_params(model, config.seed), optimizer)
    step = make_train_step(config, model, optimizer, mesh)
    state = jax.device_put(state, sharding.shardings(state, mesh))
    losses = []
    for batch in itertools.islice(device_batches(config, load_source(config), mesh, 0), count):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses, step._cache_size()


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_20_steps_are_one_program_and_repeat_bit_for_bit(tiny_config):
    """Catches a retrace (a weak type, a Python number) and any source of randomness but the seed."""
    first, losses, traces = run_steps(tiny_config, 20)
    second, again, _ = run_steps(tiny_config, 20)
    assert traces == 1
    assert losses == again
    assert_same(first, second)
    tiny_config.seed = 1
    assert run_steps(tiny_config, 1)[1] != losses[:1]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_loss_falls(tiny_config, dtype):
    """Catches a step that runs but does not learn; parameters and EMA stay in float32."""
    tiny_config.dtype = dtype
    tiny_config.optimizer.warmup_steps = 0
    tiny_config.optimizer.learning_rate = 1e-2
    tiny_config.num_train_steps = 80
    state, losses, _ = run_steps(tiny_config, 80)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3])
    assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state["ema"].averages))} == {
        jnp.dtype("float32")
    }


def test_remat_and_unroll_change_nothing(tiny_config):
    """Catches a policy name that drops or doubles a part of the gradient."""
    _, plain, _ = run_steps(tiny_config, 3)
    tiny_config.model.scan_unroll = 1
    for remat in ("dots", "full", "offload"):
        tiny_config.model.remat = remat
        np.testing.assert_allclose(run_steps(tiny_config, 3)[1], plain, rtol=1e-5)


def test_an_example_does_not_depend_on_its_batch():
    """Catches noise drawn for the batch as a whole: at the same key and stage it must be the same."""
    x1 = jax.random.uniform(jax.random.key(0), (1, 8, 8, 8, 3))
    labels = jnp.arange(8, dtype=jnp.int32)[None]
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(jnp.arange(8))[None]

    def sequences(count):
        args = (x1[:, :count], {"labels": labels[:, :count]}, keys[:, :count])
        batch, layout = objective.corrupt(Cascade(2), 2, *args, 10, 0.5)
        parts = zip(batch.tokens, batch.target, strict=True)
        per_stage = [layout.split_sequences(x) for x in (batch.timesteps, batch.condition["labels"])]
        return [(*part, *(x[s] for x in per_stage)) for s, part in enumerate(parts)]

    for large, small in zip(sequences(8), sequences(4), strict=True):
        for a, b in zip(large, small, strict=True):
            np.testing.assert_array_equal(a[:, :2], b)


def test_corruption_statistics():
    """Catches a label dropout, time or stage share that is off."""
    count = 4000
    x1, labels = jnp.zeros((1, count, 4, 4, 3)), jnp.ones((1, count), jnp.int32)
    keys = jax.random.split(jax.random.key(0), (1, count))
    batch, layout = objective.corrupt(Cascade(2), 2, x1, {"labels": labels}, keys, 10, 0.1)
    assert [group.count for group in layout.groups] == [count // 2] * 2
    assert abs(float((batch.condition["labels"] == 10).mean()) - 0.1) < 0.02
    for stage, times in enumerate(layout.split_sequences(batch.timesteps)):
        table = Cascade(2).timesteps[stage]
        assert times.min() >= table[0] - 1e-3 and times.max() <= table[-1] + 1e-3
        assert abs(float(times.mean()) - table.mean()) < 0.02 * (table[-1] - table[0])


def test_held_out_digits_are_not_trained_on(tiny_config):
    """Catches a leak of the evaluation split into training."""
    train, test = (load_source(tiny_config, split).images for split in ("train", "test"))
    assert len(train) + len(test) == 1797 and len(test) == 450
    seen = {x.tobytes() for x in train}
    assert sum(x.tobytes() in seen for x in test) <= 2


def test_clip_norm(tiny_config):
    """Catches a clip_norm of 0 that clips everything away, where it means no clipping."""
    tiny_config.optimizer.learning_rate = 1.0
    for clip_norm, factor in ((0.0, 1.0), (1.0, 0.1)):
        tiny_config.optimizer.clip_norm = clip_norm
        clip = build_optimizer(tiny_config)
        params = {"w": jnp.ones(4)}
        _, state = clip.update({"w": jnp.full(4, 5.0)}, clip.init(params), params)
        mean = jax.tree.leaves(state["adamw"])[1]
        np.testing.assert_allclose(mean, (1 - tiny_config.optimizer.b1) * 5 * factor, rtol=1e-5)


def test_schedule_and_ema(tiny_config):
    """Catches a warm-up that starts at 0, a decay that ends early, and a wrong EMA recursion."""
    opt = tiny_config.optimizer
    opt.warmup_steps, tiny_config.num_train_steps = 4, 10
    schedule = build_schedule(tiny_config, tiny_config.optimizer.learning_rate)
    rates = np.array([schedule(step) for step in range(11)]) / opt.learning_rate
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)
    assert (np.diff(rates[4:]) < 0).all() and rates[10] == pytest.approx(0, abs=1e-6)
    tiny_config.ema.decays = (0.9, 0.5)
    for warmup in (False, True):
        tiny_config.ema.warmup = warmup
        optimizer = build_optimizer(tiny_config)
        params, expected = {"w": jnp.array(2.0)}, [2.0, 2.0]
        state = optimizer.init(params)
        for step in range(3):
            updates, state = optimizer.update({"w": jnp.array(1.0)}, state, params)
            params = optax.apply_updates(params, updates)
            most = (1 + step) / (10 + step) if warmup else 1
            for i, decay in enumerate((0.9, 0.5)):
                decay = min(decay, most)
                expected[i] = decay * expected[i] + (1 - decay) * float(params["w"])
        np.testing.assert_allclose([a["w"] for a in state["ema"].averages], expected, rtol=1e-6)


def test_muon_gets_each_matrix_of_the_blocks(tiny_config, noisy_params):
    """Catches a matrix that Adam updates, a stack that is one matrix, and a rate that is not its own.

    An update by Muon is nearly orthogonal; all entries of the first one by Adam are equally large.
    """
    opt = tiny_config.optimizer
    opt.name, opt.muon_learning_rate, opt.learning_rate, opt.eps = "muon", 0.5, 0.25, 0.0
    opt.warmup_steps = 0
    first = opt.learning_rate * (1 + opt.b1 / (1 + opt.b1))  # with Nesterov momentum
    tiny_config.model.num_heads = 3  # 24 wide: other sizes than the 16 of a head
    params = noisy_params(build_model(tiny_config))
    optimizer = build_optimizer(tiny_config)
    grads = jax.tree.map(lambda x: x + 1, noisy_params(build_model(tiny_config), 1))
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    flat = flatten_dict(updates, sep="/")
    ours = {name for name in flat if name.startswith("blocks/") and name.endswith("/kernel")}
    assert len(ours) == 7
    for name, update in flat.items():
        if name not in ours:
            np.testing.assert_allclose(np.abs(update), first, rtol=1e-4, err_msg=name)
            continue
        scale = opt.muon_learning_rate * max(1, update.shape[2] / update.shape[1]) ** 0.5
        singular = np.linalg.svd(np.asarray(update), compute_uv=False) / scale
        assert 0.6 < np.median(singular) and np.max(singular) < 1.3, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resume_is_bit_identical(tiny_config, tmp_path, name):
    """Catches anything left out of a checkpoint: 2 + 2 steps must equal 4, in state and in metrics."""
    tiny_config.optimizer.name = name
    tiny_config.optimizer.schedule = "constant"  # a cosine over other steps would be another run
    whole, _ = loop.train(tiny_config, tmp_path / "whole")
    tiny_config.num_train_steps = 2
    loop.train(tiny_config, tmp_path / "parts")
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 3, "loss": 9.0}\n{"step": 4, "lo'
        )  # noted after the checkpoint, then killed
    tiny_config.num_train_steps = 4
    parts, report = loop.train(tiny_config, tmp_path / "parts")
    assert "steps 2 to 4" in report
    assert_same(whole, parts)
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_finished_run_is_left_alone(tiny_config, tmp_path):
    """Catches a second start that trains again, and one that silently starts from scratch."""
    state, _ = loop.train(tiny_config, tmp_path)
    again, _ = loop.train(tiny_config, tmp_path)
    assert_same(state, again)
    assert len(open(tmp_path / "metrics.jsonl").readlines()) == 2
    tiny_config.num_train_steps = 2
    with pytest.raises(UserError, match="past --config.num_train_steps=2"):
        loop.train(tiny_config, tmp_path)
    tiny_config.model.depth = 3
    with pytest.raises(UserError, match="model.depth: 3, was 2"):
        loop.train(tiny_config, tmp_path)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tiny_config, tmp_path):
    """Catches a NaN that is trained on, or saved over a good state."""
    tiny_config.checkpoint_every, tiny_config.num_train_steps = 1, 9
    # Every step multiplies the matrices by about -10,000
    tiny_config.optimizer.update(learning_rate=100.0, weight_decay=100.0)
    with pytest.raises(TrainingDiverged, match=r"at step [2-9]") as diverged:
        loop.train(tiny_config, tmp_path)
    params, _, meta = load_params(tmp_path, ema=0)
    assert f"at step {meta['step'] + 1};" in str(diverged.value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
