"""Checkpoints: one Orbax CheckpointManager a run, asynchronous, with the config inside.

A step's folder holds the items `params`, `ema` (a list, one entry a decay), `optimizer` and `meta`
(JSON: step, seed, data position, config, package versions), so it is all that sampling needs.
A converted checkpoint has `params` and `meta` only.
"""

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from pixelflow_jax import files
from pixelflow_jax.config import build_model, config_from_dict
from pixelflow_jax.errors import UserError
from pixelflow_jax.training.optimizer import ParamsEmaState
from pixelflow_jax.training.step import TrainState, init_params

FOLDER = "checkpoints"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def open_manager(workdir: epath.PathLike, keep: int | None = None) -> ocp.CheckpointManager:
    """The checkpoint manager of a workdir; saves in the background and keeps the last `keep`."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(epath.Path(workdir).absolute() / FOLDER, options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, config: ConfigDict) -> None:
    """Starts saving a train state. An error of an earlier save in the background is raised here."""
    step = int(state.step)
    opt_state = dict(state.opt_state)
    averages = opt_state.pop("ema").averages
    items = dict(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave(opt_state),
        meta=ocp.args.JsonSave(_meta(step, config)),
    )
    if averages:
        items["ema"] = ocp.args.StandardSave(averages)
    manager.save(step, args=ocp.args.Composite(**items))


def save_params(workdir: epath.PathLike, params: dict, config: ConfigDict) -> None:
    """Writes parameters alone as a checkpoint at step 0 (what `convert` makes)."""
    with open_manager(workdir) as manager:
        items = dict(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(_meta(0, config)))
        manager.save(0, args=ocp.args.Composite(**items))
    files.write_json(epath.Path(workdir) / "config.json", config.to_dict())


def restore(manager: ocp.CheckpointManager, step: int, template: TrainState) -> TrainState:
    """Restores a train state; `template` gives shapes, dtypes and shardings (arrays or abstract)."""
    opt_state = dict(template.opt_state)
    ema = opt_state.pop("ema")
    items = dict(
        params=ocp.args.StandardRestore(_abstract(template.params)),
        optimizer=ocp.args.StandardRestore(_abstract(opt_state)),
    )
    if ema.averages:
        items["ema"] = ocp.args.StandardRestore(_abstract(ema.averages))
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    opt_state = {
        **restored.optimizer,
        "ema": ParamsEmaState(restored.get("ema") or [], jnp.asarray(step, jnp.int32)),
    }
    return TrainState(jnp.asarray(step, jnp.int32), restored.params, opt_state)


def load_params(
    checkpoint: epath.PathLike, ema: float | None = None
) -> tuple[dict, ConfigDict, dict[str, Any]]:
    """Parameters for sampling, with their config and what else `meta` says.

    Args:
      checkpoint: a workdir (its newest step is taken) or one step's folder in it.
      ema: which average, by its decay; 0 takes the raw parameters, None the first average.

    Raises:
      UserError: if that is no checkpoint, or it has no such average.
    """
    folder, step = _find_step(checkpoint)
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False)) as manager:
        try:
            meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            config = config_from_dict(meta["config"])
        except (FileNotFoundError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{folder / str(step)} is not a whole checkpoint: {error}") from None
        abstract = jax.eval_shape(lambda: init_params(build_model(config), 0))
        decays = list(config.ema.decays) if (folder / str(step) / "ema").exists() else []
        if ema is None:
            ema = decays[0] if decays else 0.0
        if ema and ema not in decays:
            raise UserError(f"--ema={ema}: {checkpoint} has {decays or 'no averages'}; 0 is without")
        name, target = ("ema", [abstract] * len(decays)) if ema else ("params", abstract)
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(_abstract(target))})
        try:
            restored = manager.restore(step, args=args)[name]
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{folder / str(step)} does not fit its config: {error}") from None
    return restored[decays.index(ema)] if ema else restored, config, {**meta, "ema": ema}


def _find_step(checkpoint: epath.PathLike) -> tuple[epath.Path, int]:
    """(folder of all steps, step) for a workdir, a `checkpoints` folder or a step's folder."""
    path = epath.Path(checkpoint).absolute()
    if not path.exists():
        raise UserError(f"--checkpoint={checkpoint}: there is no such folder")
    if path.name.isdigit() and (path / "meta").exists():
        return path.parent, int(path.name)
    for folder in (path / FOLDER, path):
        steps = [int(name) for name in files.list_files(folder) if name.isdigit()]
        steps = [step for step in steps if (folder / str(step) / "meta").exists()]
        if steps:
            return folder, max(steps)
    raise UserError(
        f"--checkpoint={checkpoint} holds no checkpoint; give the workdir of a training run, or a "
        f"folder that pixelflow_jax.convert wrote"
    )


def _abstract(tree):
    """Shapes, dtypes and shardings of a tree of arrays (or of shapes: then one local device)."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(x):
        sharding = getattr(x, "sharding", None) or device
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _meta(step: int, config: ConfigDict) -> dict[str, Any]:
    return {
        "step": step,
        "seed": config.seed,
        "data_position": step,  # the loader's position is the number of batches drawn
        "config": config.to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
