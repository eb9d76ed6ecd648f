"""The train loop: set up, restore, then run step after step."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from pixelflow_jax.common import UserError, files, numerics
from pixelflow_jax.config import DTYPES, build_model, check_batch_size, check_config
from pixelflow_jax.data.base import Scan
from pixelflow_jax.data.broken import BrokenImages
from pixelflow_jax.data.buckets import BucketOrder, Shuffled, make_order
from pixelflow_jax.data.loader import check_main_guard, look_at_captions, make_batches
from pixelflow_jax.data.sources import Source, class_names, load_source, readable_captions
from pixelflow_jax.distributed import sharding
from pixelflow_jax.distributed.preemption import Preempted, PreemptionWatch
from pixelflow_jax.distributed.watchdog import STARTING
from pixelflow_jax.models import lora
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.sampling.generate import build_sampler, make_generate, save_grid
from pixelflow_jax.sampling.starts import FromSeed
from pixelflow_jax.text.encoder import JOINT, TextEncoder, make_text_reader
from pixelflow_jax.training import checkpoints
from pixelflow_jax.training.metrics import Metrics
from pixelflow_jax.training.optimizer import build_optimizer
from pixelflow_jax.training.programs import workload
from pixelflow_jax.training.start import (
    claimed_workdir,
    data_of,
    fill_in_words,
    holds_run,
    start_or_resume,
)
from pixelflow_jax.training.step import TrainState, make_train_step
from pixelflow_jax.training.teacher import freeze, read_teacher
from pixelflow_jax.training.writes import Saver, retried


@numerics.pinned()
def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    devices: list | None = None,
    watch: Callable[[str], None] = lambda what: None,
) -> tuple[TrainState, str]:
    """Train `config` in `workdir`, resuming from its newest checkpoint if there is one.

    Args:
      config, workdir: of a new run (a new folder), or of the run to resume.
      devices: devices to train on; default: all.
      watch: called with every new phase of this process (see watchdog.py).

    Returns:
      The final state, and a line that reports what happened.

    Raises:
      UserError: if the workdir does not hold a run of this config, the batch does not fit the devices,
        or too many images are broken.
      TrainingDiverged: if a step's metrics are not finite; the last checkpoint stays.
      CheckpointFailed: if a checkpoint cannot be written; earlier ones stay.
      Preempted: after a signal, once the state is saved.
      RuntimeError: if a loader process runs this, see `check_main_guard`.
    """
    check_main_guard()
    config, started = check_config(config), time.perf_counter()
    build_sampler(config)  # before minutes of work, what `sample` would refuse
    workdir = epath.Path(files.clean_text("workdir", os.fspath(workdir)))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices, config.mesh.context)
    check_batch_size(config, sharding.batch_shards(mesh))
    with PreemptionWatch() as preemption:
        watch(f"{STARTING}: listing {config.data.path or config.data.source}")
        holds_run(workdir, config)  # before an index is written there
        scan = Scan(workdir, lambda what: watch(f"{STARTING}: {what}"))
        source = load_source(config, scan=scan)
        fill_in_words(config, source, workdir)
        watch(f"{STARTING}: reading the teacher, if there is one")
        teacher = read_teacher(config)
        data = data_of(source, teacher)
        known = {"classes": data["classes"]}
        known |= {"base_sha256": data["teacher"]} if config.lora.rank else {}
        watch(f"{STARTING}: taking {workdir}")
        with claimed_workdir(workdir, config, data) as claim:
            state, first = _train(
                config, source, known, teacher, mesh, workdir, watch, preemption, claim
            )
    seconds = time.perf_counter() - started
    return state, f"Trained steps {first} to {config.num_train_steps} in {seconds:.0f} s: {workdir}"


def _train(
    config, source, known, teacher, mesh, workdir, watch, preemption, claim
) -> tuple[TrainState, int]:
    """Train in a claimed workdir; return the final state and the step that training began from."""
    resuming, check_claim = claim

    def starting(what):
        watch(f"{STARTING}: {what}")

    model, optimizer = build_model(config), build_optimizer(config)
    manager = checkpoints.open_manager(workdir, config.keep_checkpoints, config.keep_every)
    with _closing(manager):
        starting(f"reading checkpoints of {workdir}, or the initial parameters")
        state, meta = start_or_resume(config, model, optimizer, mesh, manager, teacher)
        first = int(state.step)
        if first > config.num_train_steps:
            raise UserError(
                f"{workdir} is at step {first}, past --config.num_train_steps={config.num_train_steps}"
            )
        train_step = make_train_step(config, model, optimizer, mesh)
        order = make_order(source, config, Scan(workdir, starting))
        batches = device_batches(config, source, mesh, first, order)
        starting("loading the text encoder")
        if config.model.context_dim and not config.text.cache and not jax.process_index():
            look_at_captions(source, config)
        encoder = frozen_encoder(config, mesh)
        frozen = freeze(config, teacher, mesh, encoder)
        draw_samples = make_sample_grid(config, source, mesh, workdir, encoder, frozen)
        broken, profiler = BrokenImages(source, config.data), Profiler(config, workdir)
        costs = workload(config, mesh)
        saver = Saver(manager)
        metrics = Metrics(workdir, first, config.num_train_steps, costs, broken, meta.get("pending", ()))
        if first:
            metrics.say(f"Resuming from step {first} of {workdir}")
        elif resuming:
            metrics.say(f"{workdir} holds this run but no checkpoint yet: starting at step 0")
        if config.model.num_classes:
            metrics.say(f"Classes of the data: {list_classes(class_names(source))}")
        with _closing(metrics), _closing(profiler):
            if meta.get("grid_due") and config.sample_every:
                starting(f"samples after step {first}")
                with metrics.paused():
                    draw_samples(state, first)
            for step in range(first + 1, config.num_train_steps + 1):
                last = step == config.num_train_steps
                profiler.before(step, state)
                (starting if step == first + 1 else watch)(f"step {step}")  # the first compiles
                with metrics.waiting():
                    batch = encoder(next(batches))
                compiles, begin = step == first + 1, time.perf_counter()
                if compiles:
                    metrics.say("Compiling the train step")
                state, numbers = train_step(state, batch, frozen)
                if compiles:
                    metrics.say(f"Compiled in {time.perf_counter() - begin:.1f} s")
                metrics.add(step, numbers)
                again = saver.due()
                if step % config.log_every == 0 or last:
                    metrics.flush()
                stop = preemption.requested(step) and not last
                draw = config.sample_every and (step % config.sample_every == 0 or last)
                save = step % config.checkpoint_every == 0 or last or stop or again
                # Before the checkpoint, so that a run resumed there has its grid. A preemption leaves
                # only seconds: then the grid is drawn on resume.
                if draw and not stop:
                    watch(f"samples after step {step}")
                    with metrics.paused():
                        draw_samples(state, step)
                if save:
                    watch(f"checkpoint after step {step}")
                    pending = metrics.check()  # a diverged state must not replace a good checkpoint
                    check_claim()
                    with metrics.paused():
                        metrics.settle()
                        saver.save(state, config, pending, bool(draw and stop), known, wait=stop or last)
                if stop:
                    raise Preempted(f"Saved step {step} of {workdir} and stopped: start it again")
    return state, first


def prepare(
    config: ConfigDict, devices: list | None = None
) -> tuple[TrainState, Callable[..., tuple[TrainState, dict]], Iterator[dict[str, jax.Array]]]:
    """Return (state, step, batches) of a new run, for a custom loop. Nothing is written.

        state, step, batches = prepare(load_config("digits"))
        for _ in range(100):
            state, numbers = step(state, next(batches))     # {"loss": ..., ...}

    The numbers are those of `train` with the same config. A step donates the memory of its state.

    Raises:
      UserError: if the batch does not fit the devices, or the data cannot be read.
      RuntimeError: as `train`.
    """
    check_main_guard()
    config = check_config(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices, config.mesh.context)
    check_batch_size(config, sharding.batch_shards(mesh))
    source = load_source(config)
    fill_in_words(config, source)
    model, optimizer = build_model(config), build_optimizer(config)
    teacher, encoder = read_teacher(config), frozen_encoder(config, mesh)
    state, _ = start_or_resume(config, model, optimizer, mesh, teacher=teacher)
    batches = device_batches(config, source, mesh, 0)
    frozen = freeze(config, teacher, mesh, encoder)
    step = make_train_step(config, model, optimizer, mesh)
    return state, functools.partial(step, frozen=frozen), map(encoder, batches)


@contextlib.contextmanager
def _closing(thing) -> Iterator[None]:
    """Close `thing` at the end; an error in closing does not hide an earlier one."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            thing.close()
        raise
    thing.close()


def device_batches(
    config: ConfigDict,
    source: Source,
    mesh: Mesh,
    first_step: int,
    order: Shuffled | BucketOrder | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Yield global batches on the mesh, from `first_step` on; each is transferred one step ahead."""
    where = NamedSharding(mesh, sharding.BATCH)
    rows = sharding.local_rows(where, config.batch_size)
    ahead = None
    for batch in make_batches(source, config, first_step, rows, order):
        placed = sharding.place_batch(batch, where, config.batch_size)
        if ahead is not None:
            yield ahead
        ahead = placed


def frozen_encoder(config: ConfigDict, mesh: Mesh) -> Callable[[dict], dict]:
    """Return a function that replaces a batch's token ids by text states, where the config needs it."""
    if not config.model.context_dim or config.text.encoder == JOINT or config.text.cache:
        return lambda batch: batch
    encoder = TextEncoder(
        config.text.encoder, mesh, DTYPES[config.dtype], width=config.model.context_dim
    )

    def encode(batch):
        rest = {name: x for name, x in batch.items() if name not in ("text_ids", "text_mask")}
        return {**rest, **encoder.condition(batch["text_ids"], batch["text_mask"])}

    return encode


def make_sample_grid(
    config: ConfigDict,
    source: Source,
    mesh: Mesh,
    workdir: epath.Path,
    encoder: Callable[[dict], dict],
    frozen: dict[str, Any] | None = None,
):
    """Return a function (state, step) that writes samples/<step>.png of every average, or of the params.

    The grids of all averages but the first have the decay or half-life in their names.
    """
    sampler = build_sampler(config)
    count = config.sample.num_images
    shards = sharding.batch_shards(mesh)
    index = np.arange(-(-count // shards) * shards)  # equally many per device
    conditions = grid_conditions(config, source, index)
    split, whole = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, P())

    specs = sharding.specs(abstract_params(sampler.model), mesh)

    @functools.partial(jax.jit, out_shardings=whole)
    def generate(params, inputs, conditions):
        make = make_generate(sampler, FromSeed(config.seed), mesh, specs)
        return make(params, inputs, *conditions).pixels

    @functools.partial(jax.jit, out_shardings=sharding.shardings(abstract_params(sampler.model), mesh))
    def add(base, adapters):
        return lora.merged(base, adapters)

    names = [*config.ema.decays, *config.ema.half_lives]

    def draw(state: TrainState, step: int) -> None:
        given = {"index": index}, *conditions
        inputs, *placed = (sharding.place_batch(x, split, len(index)) for x in given)
        placed = [encoder(condition) for condition in placed]
        averages = state.opt_state["ema"].averages
        for place, params in enumerate(averages or [state.params]):
            params = add(frozen["base"], params) if config.lora.rank else params
            pixels = jax.device_get(generate(params, inputs, placed))
            if jax.process_index() == 0:
                suffix = f"_ema{names[place]}" if place else ""
                path = workdir / "samples" / f"{step}{suffix}.png"
                retried(str(path), functools.partial(save_grid, path, pixels[:count]))

    return draw


def list_classes(names: dict[int, str], most: int = 20) -> str:
    """Return one line of class numbers and names; of more than `most`, the first ones and the last."""
    listed = [f"{label} {name}" if name != str(label) else name for label, name in names.items()]
    if len(listed) > most:
        listed[most - 2 : -1] = [f"... ({len(listed)} in all)"]
    return ", ".join(listed)


def grid_conditions(config: ConfigDict, source: Source, index: np.ndarray):
    """Return (condition, null condition) of a grid: the classes cyclically, or the first captions."""
    if not config.model.context_dim:
        # Only classes with examples
        classes = [*class_names(source)] if config.model.num_classes else [0]
        labels = np.array(classes, np.int32)[index % len(classes)]
        return {"labels": labels}, {"labels": np.full_like(labels, config.model.num_classes)}
    read = make_text_reader(config)
    texts = [readable_captions(source, int(i))[0] for i in index]
    return read(texts), read([""] * len(texts))


class Profiler:
    """Writes a trace of the steps that `config.profile` names to <workdir>/profile, for xprof."""

    def __init__(self, config: ConfigDict, workdir: epath.Path):
        self._first, self._folder = config.profile.first_step, str(workdir / "profile")
        self._end = self._first + config.profile.num_steps
        self._running = False

    def before(self, step: int, state: TrainState) -> None:
        """Start or stop the trace; call it before every step, with the state that it begins from."""
        if step in (self._first, self._end):
            jax.block_until_ready(state)  # the trace holds whole steps only
        if self._first <= step < self._end and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif step >= self._end:
            self.close()

    def close(self) -> None:
        """Stop the trace if it runs."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
