"""Checkpoints: one asynchronous Orbax CheckpointManager per run, with the config inside.

A step's folder is all that sampling needs. It holds the items `params`, `ema` (a list of averages),
`optimizer` and `meta` (JSON: step, seed, data position, config, class names, package versions). A
converted checkpoint has only `params` and `meta`.
"""

import concurrent.futures
import contextlib
import functools
import importlib.metadata
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

from pixelflow_jax.common import UserError, files, hardware, log, sentence
from pixelflow_jax.config import build_model, config_from_dict
from pixelflow_jax.foreign import released
from pixelflow_jax.training import replicas
from pixelflow_jax.training.fingerprints import check_fingerprints, fingerprints
from pixelflow_jax.training.optimizer import ParamsEmaState
from pixelflow_jax.training.step import TrainState, abstract_trained

FOLDER = "checkpoints"
STEP = re.compile(r"[0-9]{1,18}")  # the name of a step's folder
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SAVE_TIMEOUT = 1800  # seconds after which a background save counts as failed


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written; earlier ones are intact."""


def open_manager(
    workdir: epath.PathLike, keep: int | None = None, keep_every: int | None = None
) -> ocp.CheckpointManager:
    """Return a workdir's manager; it keeps the last `keep` steps and all multiples of `keep_every`."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every or None,
        create=True,
        cleanup_tmp_directories=True,  # what a kill during a save leaves
        async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT),
    )
    return _open(files.absolute(workdir) / FOLDER, options)


def _open(folder: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    """Open a manager. Raises UserError if the metadata of any step in the folder are damaged."""
    try:
        return ocp.CheckpointManager(folder, options=options)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{folder} does not hold whole checkpoints: {_in_short(error)}. Move the damaged step away"
        ) from None


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    config: ConfigDict,
    pending: Sequence[tuple[int, dict[str, Any]]] = (),
    grid_due: bool = False,
    known: dict[str, Any] | None = None,
) -> None:
    """Start saving a train state in the background.

    Raises CheckpointFailed if this save, or an earlier background save, fails.

    Args:
      manager, state, config: the run's.
      pending: (step, metrics) of the steps that no logged mean includes yet.
      grid_due: whether this step's samples are still to be drawn.
      known: for `meta`: "classes", the names of the data's classes by number; of adapters also
        "base_sha256", a digest of the parameters that they are added to.
    """
    step, more = int(state.step), dict(pending=[*pending], grid_due=grid_due, **(known or {}))
    items = _items(step, config, _trees(state), more)
    with _failures(manager):
        _in_daemon(lambda: manager.save(step, args=items))


def _in_daemon(work: Callable[[], Any]) -> Any:
    """Return `work()`, run in a daemon thread, so that the threads it starts are daemons too.

    Some of Orbax's threads wait for minutes after a failed save, and Python would join them at exit. All
    calls share one thread, because Orbax raises a failure once in each thread that asks.
    """
    done: concurrent.futures.Future = concurrent.futures.Future()
    _daemon().put((work, done))
    return done.result()


@functools.cache
def _daemon() -> queue.SimpleQueue:
    """Return the queue of the daemon thread."""
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
    """Raise CheckpointFailed if the last background save failed; with `wait`, wait for it to finish."""
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


def save_params(
    workdir: epath.PathLike, params: dict, config: ConfigDict, classes: dict[str, str] | None = None
) -> None:
    """Write parameters alone as a checkpoint at step 0, as `convert` does; with names of its classes."""
    with open_manager(workdir) as manager:
        more = {"classes": classes} if classes else None
        manager.save(0, args=_items(0, config, {"params": params}, more))
    files.write_json(epath.Path(workdir) / "config.json", config.to_dict())


def restore_newest(
    manager: ocp.CheckpointManager, template: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """Return the newest whole checkpoint with its `meta`, or None if the run has no checkpoints.

    Damaged checkpoints are reported, and moved to <workdir>/damaged once an older one is restored.
    Raises UserError if all are damaged, which must not lead to a silent fresh start.
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
    """Return ((state, meta), "") or (None, reason), with the same verdict on every process.

    Each process reads by itself, without Orbax's barriers, so that a failure leaves no other process
    waiting. Then all agree on the outcome, and only then compare checksums, which needs all of them. The
    state is read only by processes that hold its first copy (see replicas.py): a bucket is read once.
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
            restored = _restore(reader, step, first if replicas.holds(first) else None)
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise  # out of memory is not damage
        except PermissionError as error:
            raise UserError(f"no permission to read {folder / str(step)}: {error}") from None
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
    """Return the items of a checkpoint that hold arrays."""
    opt_state = dict(state.opt_state)
    averages = opt_state.pop("ema").averages
    trees = {"params": state.params, "optimizer": opt_state}
    return trees | ({"ema": averages} if averages else {})


def _in_short(error: BaseException) -> str:
    """Return the first line of an error, shortened, without tensorstore's source locations and specs."""
    first = (str(error).strip() or repr(error)).splitlines()[0]
    details = r" See full TensorStore details.*| \[(source locations|\w*spec|os_error\w*)=.*"
    return sentence(re.sub(details, "", first), 400)


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    """Move a damaged step out of the way of the next save at this step."""
    log.warning("checkpoint %d is moved to %s", step, manager.directory.parent / "damaged")
    aside = manager.directory.parent / "damaged" / str(step)
    if jax.process_index() == 0:
        # A rename in a bucket needs an existing folder, and a bucket has no empty ones.
        note = b"Checkpoints that could not be restored.\n"
        files.write_bytes(aside.parent / "README.txt", note)
        files.remove(aside)
        (manager.directory / str(step)).rename(aside)
    multihost_utils.sync_global_devices("damaged checkpoint set aside")
    manager.reload()


def _restore(
    manager: ocp.CheckpointManager, step: int, template: TrainState | None
) -> tuple[TrainState | None, dict[str, Any]]:
    """Return (state, meta) of a step, on any mesh; without a template, the state is None."""
    trees = _trees(template) if template else {}
    items = {name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in trees.items()}
    restored = manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
    meta = _checked_meta(restored.meta)
    if template is None:
        return None, meta
    count, ema_count = (
        jax.make_array_from_callback((), template.step.sharding, lambda _: np.asarray(step, np.int32))
        for _ in range(2)
    )
    ema = ParamsEmaState(restored.get("ema") or [], ema_count)
    return TrainState(count, restored.params, {**restored.optimizer, "ema": ema}), meta


def _checked_meta(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict) or not {"step", "config"} <= meta.keys():
        raise ValueError("its meta item is not one of a checkpoint")
    return meta


def load_params(
    checkpoint: epath.PathLike, ema: float | None = None
) -> tuple[dict, ConfigDict, dict[str, Any]]:
    """Return (parameters, config, meta) of a checkpoint, for sampling.

    All processes must call it; they read the step that process 0 finds. Raises UserError if `checkpoint`
    is not a checkpoint or has no such average.

    Args:
      checkpoint: a workdir, which stands for its newest step; a step's folder under any name; or
        official weights, a folder or a hub id (foreign/released.py).
      ema: the decay or half-life of an average; 0 for the raw parameters, None for the first average.
    """
    params, config, meta = load_any(checkpoint, ema)
    if config.lora.rank:
        raise UserError(
            f"--checkpoint={checkpoint} holds adapters only: name the checkpoint that they were trained "
            f"on, {config.init_from}, and add --lora={checkpoint}"
        )
    return params, config, meta


def load_any(checkpoint: epath.PathLike, ema: float | None) -> tuple[dict, ConfigDict, dict[str, Any]]:
    """Return what `load_params` does, also of a run's adapters alone."""
    hardware.local_devices()
    folder, newest = _find_or_convert(checkpoint)
    # A run may save meanwhile, so process 0 decides; in two parts, as JAX has 32 bits.
    step = divmod(int(folder.name), 10**9) if newest else (0, 0)
    parts = multihost_utils.broadcast_one_to_all(np.array(step, np.int32))
    if newest:
        folder = folder.parent / str(int(parts[0]) * 10**9 + int(parts[1]))
    try:
        meta = _checked_meta(_read(folder, "meta", ocp.args.JsonRestore()))
        config = config_from_dict(meta["config"])
        abstract = abstract_trained(config, build_model(config))
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
    """Return an item of a step's folder. Raises UserError if it is missing."""
    if not (folder / name).exists():
        raw = "; --ema=0 samples the raw parameters" if name == "ema" else ""
        raise UserError(f"{folder / name} is missing: copy all of the checkpoint{raw}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.Composite(**{name: how}))[name]


def find_step(checkpoint: epath.PathLike) -> tuple[epath.Path, bool]:
    """Return (a step's folder, whether it was chosen as the newest).

    `checkpoint` is a workdir, its folder of checkpoints, or a step's folder. Raises UserError if there
    is no checkpoint.
    """
    path = files.absolute(files.clean_text("--checkpoint", os.fspath(checkpoint)))
    if not path.exists():
        raise UserError(f"--checkpoint={checkpoint}: there is no such folder")
    for folder in (path / FOLDER, path):
        if folder == path and _is_step(path):
            return path, False
        steps = [int(name) for name in files.list_files(folder) if STEP.fullmatch(name)]
        steps = [step for step in steps if _is_step(folder / str(step))]
        # In a bucket a step has its name before it is complete. Orbax then marks it as final, but a run
        # that was copied there has no marks.
        whole = [step for step in steps if ocp.utils.is_checkpoint_finalized(folder / str(step))]
        if steps:
            return folder / str(max(whole or steps)), True
    raise UserError(
        f"--checkpoint={checkpoint} holds no checkpoint; give the workdir of a training run, a step's "
        f"folder, or a folder that pixelflow_jax.convert wrote"
    )


def _find_or_convert(checkpoint: epath.PathLike) -> tuple[epath.Path, bool]:
    """Return what `find_step` does, also of official weights."""
    try:
        return find_step(checkpoint)
    except UserError:
        official = released.find_official(os.fspath(checkpoint))
        if official is None:
            raise
        return find_step(released.converted(official, save_params))


def _is_step(folder: epath.Path) -> bool:
    return any((folder / name).exists() for name in ("meta", "params", "ema"))


def _abstract(tree):
    """Return a tree's shapes, dtypes and shardings (default: on one local device)."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def one(x):
        sharding = getattr(x, "sharding", None) or device
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _items(step: int, config: ConfigDict, trees: dict, more: dict | None = None) -> ocp.args.Composite:
    """Return what a checkpoint consists of; `more` is added to `meta`."""
    meta = {
        "step": step,
        "seed": config.seed,
        "data_position": step,  # batches drawn
        "config": config.to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "fingerprints": {name: fingerprints(tree) for name, tree in trees.items()},
        **(more or {}),
    }
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    return ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
