"""The train loop: set up, restore, and go step by step to the end."""

import time

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from pixelflow_jax import files
from pixelflow_jax.config import build_model, config_from_dict, differences
from pixelflow_jax.data.loader import Loader
from pixelflow_jax.data.sources import load_source
from pixelflow_jax.errors import UserError
from pixelflow_jax.sampling.generate import build_sampler, image_keys, make_generate, save_grid
from pixelflow_jax.training import checkpoints
from pixelflow_jax.training.metrics import Metrics
from pixelflow_jax.training.optimizer import build_optimizer
from pixelflow_jax.training.step import TrainState, init_params, init_state, make_train_step


def train(config: ConfigDict, workdir: epath.PathLike) -> tuple[TrainState, str]:
    """Trains `config` in `workdir`, going on from its newest checkpoint if there is one.

    Returns the final state and a line that says what happened.

    Raises:
      UserError: if the workdir holds something else than a run of the same config.
      TrainingDiverged: if a step's numbers are not finite; the last checkpoint stays.
    """
    workdir = epath.Path(workdir)
    if config.model.context_dim:
        raise UserError("training a text model needs captions, which this version does not have yet")
    examples = load_source(config)
    resuming = claim_workdir(workdir, config)
    started = time.perf_counter()

    model, optimizer = build_model(config), build_optimizer(config)
    init = jax.jit(lambda: init_state(init_params(model, config.seed), optimizer))
    manager = checkpoints.open_manager(workdir, config.keep_checkpoints)
    first = manager.latest_step() or 0
    if first > config.num_train_steps:
        raise UserError(
            f"{workdir} is at step {first}, past --config.num_train_steps={config.num_train_steps}"
        )
    state = checkpoints.restore(manager, first, jax.eval_shape(init)) if first else init()

    train_step = make_train_step(config, model, optimizer)
    draw_samples = make_sample_grid(config, workdir)
    batches = Loader(examples, config.batch_size, config.seed).iterate(first)
    metrics = Metrics(workdir, first, config.num_train_steps, config.batch_size)
    if first:
        metrics.say(f"Going on from step {first} of {workdir}")
    elif resuming:
        metrics.say(f"{workdir} holds this run, but no checkpoint yet: it starts at step 0")
    try:
        for step in range(first + 1, config.num_train_steps + 1):
            last = step == config.num_train_steps
            state, numbers = train_step(state, next(batches))
            metrics.add(step, numbers)
            if step % config.log_every == 0 or last:
                metrics.flush()
            if step % config.checkpoint_every == 0 or last:
                metrics.check()  # a broken state must not replace a good checkpoint
                with metrics.paused():
                    checkpoints.save(manager, state, config)
            if config.sample_every and (step % config.sample_every == 0 or last):
                with metrics.paused():
                    draw_samples(state, step)
        manager.wait_until_finished()
    finally:
        metrics.close()
        manager.close()
    seconds = time.perf_counter() - started
    return state, f"Trained steps {first} to {config.num_train_steps} in {seconds:.0f} s: {workdir}"


def claim_workdir(workdir: epath.Path, config: ConfigDict) -> bool:
    """Writes config.json into a new workdir, or makes sure that an old one is of the same run.

    Returns whether there was a run. Raises UserError if it differs, or if other files are there.
    """
    path = workdir / "config.json"
    names = files.list_files(workdir)
    if path.name in names:
        try:
            changed = differences(config, config_from_dict(files.read_json(path)))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not the config of a run: {error}") from None
        if changed:
            raise UserError(
                f"--workdir={workdir} holds a run of another config; these differ: "
                f"{'; '.join(changed)}. Name a new workdir"
            )
    elif names:
        raise UserError(f"--workdir={workdir} holds files but no run; name a new or empty folder")
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, config.to_dict())
    return path.name in names


def make_sample_grid(config: ConfigDict, workdir: epath.Path):
    """A function (state, step) that writes samples/<step>.png from the first EMA, or the params."""
    sampler = build_sampler(config)
    generate = make_generate(sampler)
    index = jnp.arange(config.sample.num_images)
    keys, labels = image_keys(config.seed, index), index % max(config.model.num_classes, 1)

    def draw(state: TrainState, step: int) -> None:
        averages = state.opt_state["ema"].averages
        pixels = generate(averages[0] if averages else state.params, keys, labels)
        (workdir / "samples").mkdir(exist_ok=True)
        save_grid(workdir / "samples" / f"{step}.png", jax.device_get(pixels))

    return draw
