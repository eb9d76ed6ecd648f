"""Checkpoints: one Orbax CheckpointManager a run, asynchronous, with the config inside.

A step's folder holds the items `params`, `ema` (a list, one entry a decay), `optimizer` and `meta`
(JSON: step, seed, data position, config, names of the classes, package versions), so it is all that
sampling needs. A converted checkpoint has `params` and `meta` only.
"""

import concurrent.futures
import contextlib
import functools
import importlib.metadata
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from pixelflow_jax.common import files, hardware
from pixelflow_jax.common.errors import UserError, sentence
from pixelflow_jax.config import build_model, config_from_dict
from pixelflow_jax.models.conditioning import init_params
from pixelflow_jax.training import replicas
from pixelflow_jax.training.fingerprints import check_fingerprints, fingerprints
from pixelflow_jax.training.optimizer import ParamsEmaState
from pixelflow_jax.training.step import TrainState

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
STEP = re.compile(r"[0-9]{1,18}")  # the name of one in it
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SAVE_TIMEOUT = 1800  # seconds after which a save in the background counts as failed


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


def open_manager(
    workdir: epath.PathLike, keep: int | None = None, keep_every: int | None = None
) -> ocp.CheckpointManager:
    """The checkpoint manager of a workdir; saves in the background.

    It keeps the last `keep`, and those at multiples of `keep_every`.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every or None,
        create=True,
        cleanup_tmp_directories=True,  # what a kill during a save leaves
        async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT),
    )
    return _open(files.absolute(workdir) / FOLDER, options)


def _open(folder: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    """Raises UserError if Orbax's own notes in the folder are damaged: it reads those of every step."""
    try:
        return ocp.CheckpointManager(folder, options=options)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{folder} is not a folder of whole checkpoints: {_in_short(error)}. Move the step away "
            f"that is damaged"
        ) from None


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    config: ConfigDict,
    pending: Sequence[tuple[int, dict[str, Any]]] = (),
    grid_due: bool = False,
    classes: dict[str, str] | None = None,
) -> None:
    """Starts saving a train state. An error of an earlier save in the background is raised here.

    `pending` are the metrics of steps that no logged mean holds yet; `grid_due` says that the samples
    of this step are still to be drawn; `classes` are the names of the data's, by number.

    Raises:
      CheckpointFailed: if this save, or an earlier one in the background, cannot be written.
    """
    step, trees = int(state.step), _trees(state)
    meta = {**_meta(step, config, trees), "pending": list(pending), "grid_due": grid_due}
    meta["classes"] = classes or {}
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items["meta"] = ocp.args.JsonSave(meta)
    with _failures(manager):
        _in_daemon(lambda: manager.save(step, args=ocp.args.Composite(**items)))


def _in_daemon(work: Callable[[], Any]) -> Any:
    """What `work` gives, done in a daemon thread, so that threads which it starts are daemons too.

    After a save that failed some of Orbax's wait for minutes, and Python would join them at its end. It
    is one thread for all, as Orbax raises a failure once in each thread that asks.
    """
    done: concurrent.futures.Future = concurrent.futures.Future()
    _daemon().put((work, done))
    return done.result()


@functools.cache
def _daemon() -> queue.SimpleQueue:
    """What the daemon thread works off."""
    calls: queue.SimpleQueue = queue.SimpleQueue()

    def run():
        while True:
            work, done = calls.get()
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            del work, done  # they may hold a whole state

    threading.Thread(target=run, name="checkpoints", daemon=True).start()
    return calls


def check_background_save(manager: ocp.CheckpointManager, wait: bool = False) -> None:
    """Raises CheckpointFailed if the last save in the background has failed; may wait for its end."""
    with _failures(manager):
        _in_daemon(manager.check_for_errors)
        if wait:
            _in_daemon(manager.wait_until_finished)


@contextlib.contextmanager
def _failures(manager: ocp.CheckpointManager):
    try:
        yield
    except Exception as error:  # tensorstore, the file system or a timeout
        raise CheckpointFailed(
            f"a checkpoint could not be saved in {manager.directory}: {_in_short(error)}"
        ) from error


def save_params(workdir: epath.PathLike, params: dict, config: ConfigDict) -> None:
    """Writes parameters alone as a checkpoint at step 0 (what `convert` makes)."""
    with open_manager(workdir) as manager:
        meta = _meta(0, config, {"params": params})
        items = dict(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
        manager.save(0, args=ocp.args.Composite(**items))
    files.write_json(epath.Path(workdir) / "config.json", config.to_dict())


def restore_newest(
    manager: ocp.CheckpointManager, template: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest whole checkpoint of a run with its `meta`, or None if it has none at all.

    Damaged ones are reported, and moved to <workdir>/damaged once an older one has been restored.

    Raises:
      UserError: if there are checkpoints, but all are damaged: better than a silent fresh start.
    """
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        restored, reason = _try_restore(manager.directory, step, template)
        if restored is not None:
            for bad in damaged:
                _set_aside(manager, bad)
            return restored
        log.warning("checkpoint %d in %s is damaged: %s", step, manager.directory, reason)
        damaged.append(step)
    if damaged:
        raise UserError(
            f"no checkpoint in {manager.directory} can be restored (see above); nothing was changed. "
            f"Mend or remove them, or name a new --workdir"
        )
    return None


def _try_restore(
    folder: epath.Path, step: int, template: TrainState
) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
    """(state and meta, "") or (None, why not); the same verdict on every process.

    Each process reads on its own, without Orbax's barriers, so that one that fails does not leave the
    others waiting; then they agree, and only then compare checksums, which takes all of them. Processes
    that hold other copies of what is read already get it from there: a bucket is read once.
    """
    mine = ocp.options.MultiprocessingOptions(
        primary_host=None,
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=mine)
    first = replicas.first_copy(template)
    restored, reason = None, ""
    with _open(folder, options) as reader:
        try:
            state = restore(reader, step, first) if replicas.holds(first) else None
            restored = state, _step_meta(reader, step)
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise  # out of memory is not damage
        except PermissionError as error:
            raise UserError(f"{folder / str(step)} may not be read: {error}") from None
        except Exception as error:  # Orbax and tensorstore raise a dozen kinds, bare Exception too
            reason = _in_short(error)
    if not np.all(multihost_utils.process_allgather(np.array(restored is not None))):
        return None, reason or "another process could not read it"
    state, meta = restored
    state = replicas.copy_to_all(state, first, template)
    try:
        for name, tree in _trees(state).items():
            check_fingerprints(name, tree, meta)
    except ValueError as error:
        return None, str(error)
    return (state, meta), ""


def _trees(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint that hold arrays."""
    opt_state = dict(state.opt_state)
    averages = opt_state.pop("ema").averages
    trees = {"params": state.params, "optimizer": opt_state}
    return trees | ({"ema": averages} if averages else {})


def _in_short(error: BaseException) -> str:
    """The first line of an error, without tensorstore's list of places and of what it was given.

    A long one loses its middle: the reason stands at the end.
    """
    first = (str(error).strip() or repr(error)).splitlines()[0]
    short = re.sub(
        r" See full TensorStore details.*| \[(source locations|\w*spec|os_error\w*)=.*", "", first
    )
    return sentence(short, 400)


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    """Moves a step's folder out of the way of the save that will come at this step again."""
    log.warning("checkpoint %d is moved to %s", step, manager.directory.parent / "damaged")
    aside = manager.directory.parent / "damaged" / str(step)
    if jax.process_index() == 0:
        # A bucket has no empty folders, and renames into one that exists only.
        note = b"Checkpoints that could not be restored.\n"
        files.write_bytes(aside.parent / "README.txt", note)
        files.remove(aside)
        (manager.directory / str(step)).rename(aside)
    multihost_utils.sync_global_devices("damaged checkpoint set aside")
    manager.reload()


def restore(manager: ocp.CheckpointManager, step: int, template: TrainState) -> TrainState:
    """Restores a train state; `template` gives shapes, dtypes and shardings (arrays or abstract).

    The shardings, and so the mesh and the number of processes, may be others than at the save.
    """
    items = {name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in _trees(template).items()}
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    where = template.step.sharding
    counters = [
        jax.make_array_from_callback((), where, lambda _: np.asarray(step, np.int32)) for _ in range(2)
    ]
    ema = ParamsEmaState(restored.get("ema") or [], counters[0])
    return TrainState(counters[1], restored.params, {**restored.optimizer, "ema": ema})


def _step_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return _checked_meta(
        manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    )


def _checked_meta(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict) or not {"step", "config"} <= meta.keys():
        raise ValueError("its meta item is not one of a checkpoint")
    return meta


def load_params(
    checkpoint: epath.PathLike, ema: float | None = None
) -> tuple[dict, ConfigDict, dict[str, Any]]:
    """Parameters for sampling, with their config and what else `meta` says.

    Of several processes, all must call it; they read the step that process 0 finds.

    Args:
      checkpoint: a workdir (its newest step is taken) or one step's folder, under any name.
      ema: which average, by its decay or half-life; 0 takes the raw parameters, None the first average.

    Raises:
      UserError: if that is no checkpoint, or it has no such average.
    """
    hardware.local_devices()
    folder, newest = find_step(checkpoint)
    # One step for all, though a training may save meanwhile; in two parts, as JAX has 32 bits.
    step = divmod(int(folder.name), 10**9) if newest else (0, 0)
    parts = multihost_utils.broadcast_one_to_all(np.array(step, np.int32))
    if newest:
        folder = folder.parent / str(int(parts[0]) * 10**9 + int(parts[1]))
    try:
        meta = _checked_meta(_read(folder, "meta", ocp.args.JsonRestore()))
        config = config_from_dict(meta["config"])
        abstract = jax.eval_shape(lambda: init_params(build_model(config), 0))
    except (OSError, ArithmeticError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is not a whole checkpoint: {_in_short(error)}") from None
    known = [*config.ema.decays, *config.ema.half_lives]
    known = known if "ema" in meta.get("fingerprints", ()) or (folder / "ema").exists() else []
    if ema is None:
        ema = known[0] if known else 0.0
    if ema and ema not in known:
        raise UserError(f"--ema={ema}: {checkpoint} has {known or 'no averages'}; 0 is without")
    name, target = ("ema", [abstract] * len(known)) if ema else ("params", abstract)
    try:
        restored = _read(folder, name, ocp.args.StandardRestore(_abstract(target)))
        check_fingerprints(name, restored, meta)
    except (jax.errors.JaxRuntimeError, MemoryError, UserError):
        raise
    except Exception as error:  # Orbax and tensorstore raise a dozen kinds
        raise UserError(f"{folder} is damaged, or does not fit its config: {_in_short(error)}") from None
    return restored[known.index(ema)] if ema else restored, config, {**meta, "ema": ema}


def _read(folder: epath.Path, name: str, how: ocp.args.CheckpointArgs) -> Any:
    """An item of a step's folder, which may have any name. Raises UserError if it is not there."""
    if not (folder / name).exists():
        raw = "; --ema=0 samples the raw parameters" if name == "ema" else ""
        raise UserError(f"{folder / name} is missing: copy all of the checkpoint{raw}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.Composite(**{name: how}))[name]


def find_step(checkpoint: epath.PathLike) -> tuple[epath.Path, bool]:
    """(a step's folder, whether it is the newest of several) of a workdir, or of that folder itself.

    Raises:
      UserError: if there is none.
    """
    path = files.absolute(files.clean_text("--checkpoint", os.fspath(checkpoint)))
    if not path.exists():
        raise UserError(f"--checkpoint={checkpoint}: there is no such folder")
    for folder in (path / FOLDER, path):
        if folder == path and _is_step(path):
            return path, False
        steps = [int(name) for name in files.list_files(folder) if STEP.fullmatch(name)]
        steps = [step for step in steps if _is_step(folder / str(step))]
        # In a bucket a step has its name before all of it is there, and a mark at the end, which a run
        # that was copied there does not have.
        whole = [step for step in steps if ocp.utils.is_checkpoint_finalized(folder / str(step))]
        if steps:
            return folder / str(max(whole or steps)), True
    raise UserError(
        f"--checkpoint={checkpoint} holds no checkpoint; give the workdir of a training run, a step's "
        f"folder, or a folder that pixelflow_jax.convert wrote"
    )


def _is_step(folder: epath.Path) -> bool:
    return any((folder / name).exists() for name in ("meta", "params", "ema"))


def _abstract(tree):
    """Shapes, dtypes and shardings of a tree of arrays (or of shapes: then one local device)."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def one(x):
        sharding = getattr(x, "sharding", None) or device
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _meta(step: int, config: ConfigDict, trees: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": step,
        "seed": config.seed,
        "data_position": step,  # batches drawn: the loader's position is the step number
        "config": config.to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "fingerprints": {name: fingerprints(tree) for name, tree in trees.items()},
    }
