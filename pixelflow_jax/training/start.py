"""The start of a run: its workdir, its data, and its state, new or restored."""

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pixelflow_jax.common import UserError, blame, files
from pixelflow_jax.common.claims import Description, claim
from pixelflow_jax.config import build_model, config_from_dict, differences
from pixelflow_jax.data.buckets import SIZES
from pixelflow_jax.data.loader import captions
from pixelflow_jax.data.sources import Source, class_names
from pixelflow_jax.data.tars import INDEX
from pixelflow_jax.distributed import hosts, sharding
from pixelflow_jax.foreign.released import is_hub_id
from pixelflow_jax.models import lora
from pixelflow_jax.models.conditioning import INTERVAL, init_params
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.models.warm_start import from_class_model, with_patch_sizes
from pixelflow_jax.text.encoder import JOINT
from pixelflow_jax.text.tokenizer import distinct_words
from pixelflow_jax.training import checkpoints
from pixelflow_jax.training.fingerprints import params_hash
from pixelflow_jax.training.step import TrainState, abstract_state, init_state

CONFIG, DATA = "config.json", "data.json"  # in a workdir


def start_or_resume(
    config: ConfigDict,
    model: PixelFlow,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    manager: ocp.CheckpointManager | None = None,
    teacher: dict | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Return (state, meta) of the newest checkpoint, or of a new run, whose meta are empty.

    A student begins as its `teacher`; adapters as nothing. Each device initializes or reads its own
    part, so no host holds a whole state. Only the parameters that `config.init_from` names, and a
    teacher's, are whole on each host.
    """
    template = abstract_state(config, model, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, template)
    restored = checkpoints.restore_newest(manager, template) if manager else None
    if restored is not None:
        return restored

    def fresh():
        if config.lora.rank:
            return lora.init_adapters(model, config.lora.rank, config.seed)
        return init_params(model, config.seed)

    if config.lora.rank or not config.init_from and teacher is None:
        begin = jax.jit(lambda: init_state(fresh(), optimizer), out_shardings=shardings)
        return begin(), {}
    if teacher is not None:
        params = {**teacher, INTERVAL: jax.jit(fresh)()[INTERVAL]}
    else:
        params, was = initial_params("init_from", config.init_from)
        check_meaning(config, was, "init_from", config.init_from)
        sizes = (build_model(c).patch_sizes for c in (was, config))
        unlike = f"config.init_from={config.init_from}: its parameters are not what its config says"
        with blame(unlike, (KeyError, TypeError, ValueError, AttributeError)):
            params = with_patch_sizes(params, *sizes)
    if model.context_dim and "class_embed" in params:
        params = from_class_model(params, jax.jit(fresh)())
    check_shapes(params, template.params, f"config.init_from={config.init_from}")
    begin = jax.jit(lambda params: init_state(params, optimizer), out_shardings=shardings)
    return begin(sharding.placed(params, shardings.params)), {}


def check_init_from(config: ConfigDict, workdir: str) -> None:
    """Raise UserError if the parameters that a run begins from, or its teacher, are missing."""
    begun = has_begun(epath.Path(workdir))
    for key, path in (("init_from", config.init_from), ("distill.teacher", config.distill.teacher)):
        begins = key == "init_from" and not config.lora.rank  # adapters read it at every start
        there = not path or begun and begins or epath.Path(path).exists()
        if not there and not is_hub_id(path):
            raise UserError(f"--config.{key}={path}: there is no such file or folder")


def initial_params(key: str, path: str) -> tuple[dict, ConfigDict]:
    """Return the parameters that a config key names, and their config: our own or official weights."""
    try:
        return checkpoints.load_params(path)[:2]
    except UserError as error:
        raise UserError(f"config.{key}={path} cannot be read: {error}") from None


def check_shapes(params: dict, expected: dict, where: str) -> None:
    """Raise UserError unless `params`, from `where`, have the names and shapes of the config's model."""
    ours, theirs = (
        {name: x.shape for name, x in flatten_dict(tree, sep="/").items()} for tree in (expected, params)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{where} does not fit config.model: {name} is "
                f"{theirs.get(name, 'missing')} there, {ours.get(name, 'unknown')} here"
            )


def check_meaning(config: ConfigDict, was: ConfigDict, key: str, path: str) -> None:
    """Raise UserError if parameters were trained with other heads or words: shapes do not show that."""
    joint = all(c.text.encoder == JOINT for c in (config, was))
    if joint and config.text.words != was.text.words:
        raise UserError(f"config.text.words are not those of config.{key}={path}")
    for section in ("model", "text") if joint else ("model",):
        new, old = (c[section].num_heads for c in (config, was))
        if new != old:
            raise UserError(
                f"config.{section}.num_heads is {new}, but that of config.{key}={path} is {old}"
            )


def has_begun(workdir: epath.Path) -> bool:
    """Return whether a workdir holds a checkpoint to resume from."""
    names = files.list_files(workdir / checkpoints.FOLDER)
    return any(checkpoints.STEP.fullmatch(name) for name in names)


def holds_run(workdir: epath.Path, config: ConfigDict) -> bool:
    """Return whether a workdir holds this run; if not, it is new or empty.

    Raises UserError if the run there is of another config, or other files are there.
    """
    return _described(config).is_kept_in(workdir)


def _described(config: ConfigDict) -> Description:
    changes = functools.partial(differences, config)
    return Description(
        config.to_dict(), "a run of another config", CONFIG, "--workdir", "run", (INDEX,), changes
    )


def fill_in_words(config: ConfigDict, source: Source, workdir: epath.PathLike | None = None) -> None:
    """Set the vocabulary of a joint encoder if `config` has none: the words of the captions.

    A run keeps the words that it began with, also after its captions have been corrected.
    """
    if config.text.encoder != JOINT or config.text.words:
        return
    if workdir and CONFIG in files.list_files(workdir):
        config.text.words = config_from_dict(files.read_json(epath.Path(workdir) / CONFIG)).text.words
    else:
        config.text.words = distinct_words(captions(source))


def data_of(source: Source, teacher: dict | None = None) -> dict[str, Any]:
    """Return what identifies data wherever they are: number of examples, digest, classes, teacher.

    The digest covers names (and labels) or, for examples without names, sizes and checksums. It needs
    nothing that the source has not read already. Raises UserError if the processes see different data.
    """
    found = {
        "examples": len(source),
        "digest": source.digest(),
        "classes": {str(label): name for label, name in class_names(source).items()},
        **({} if teacher is None else {"teacher": params_hash(teacher)}),
    }
    check = hashlib.sha256(json.dumps(found).encode()).digest()[:16]
    checks = np.atleast_2d(multihost_utils.process_allgather(np.frombuffer(check, np.uint32)))
    if len(np.unique(checks, axis=0)) > 1:
        others = [str(i) for i, other in enumerate(checks) if (other != checks[0]).any()]
        raise UserError(
            f"config.data.path shows process {', '.join(others)} other data than process 0; this one "
            f"({jax.process_index()}) sees {len(source)} examples"
        )
    return found


def check_same_data(workdir: epath.Path, data: dict[str, Any]) -> None:
    """Raise UserError if the run in a workdir was trained on other data (see `data_of`)."""
    if not has_begun(workdir) or DATA not in files.list_files(workdir):  # older versions did not keep it
        return
    was = files.read_json(workdir / DATA)
    if was == data:
        return
    said, path = [], workdir / DATA
    with blame(f"{path} does not say what a run's data are", (KeyError, TypeError, AttributeError)):
        if was["examples"] != data["examples"]:
            said.append(f"{data['examples']} examples, it had {was['examples']}")
        if was.get("teacher") != data.get("teacher"):
            adapts = files.read_json(workdir / CONFIG).get("lora", {}).get("rank")
            key = "init_from" if adapts else "distill.teacher"
            said.append(f"config.{key} holds other weights")
        for label in sorted(was["classes"].keys() | data["classes"].keys(), key=int):
            old, new = was["classes"].get(label), data["classes"].get(label)
            if old != new:
                said.append(f"class {label} is {new or 'without examples'}, it was {old or 'without'}")
    said = said[:3] or ["as many examples, but with other names, sizes, labels or order"]
    raise UserError(
        f"--workdir={workdir} holds a run on other data than config.data.path shows: {'; '.join(said)}. "
        f"Restore the data, or name a new workdir (--config.init_from={workdir} keeps the weights)"
    )


@contextlib.contextmanager
def claimed_workdir(
    workdir: epath.Path, config: ConfigDict, data: dict[str, Any]
) -> Iterator[tuple[bool, Callable[[], None]]]:
    """Claim a workdir (see claims.py), and write config.json and data.json there.

    The start of a run that has taken steps stays in its config, whatever `config.init_from` says.

    Yields and raises as `claim`; also raises as `check_same_data`.
    """
    holds_run(workdir, config)
    check_same_data(workdir, data)
    if has_begun(workdir) and not config.lora.rank:
        kept = files.read_json(workdir / CONFIG).get("init_from", "")
        if config.init_from and jax.process_index() == 0:
            other = f" (it began from {kept or 'random parameters'})" if kept != config.init_from else ""
            print(
                f"config.init_from={config.init_from} is not read: the run in {workdir} "
                f"resumes from its own checkpoint{other}",
                file=sys.stderr,
            )
        config.init_from = kept
    with claim(workdir, _described(config), hosts.barrier) as (there, check):
        if jax.process_index() == 0:
            if DATA in files.list_files(workdir) and files.read_json(workdir / DATA) != data:
                files.remove(workdir / SIZES)  # of other images, in a run that has not begun
            files.write_json(workdir / CONFIG, config.to_dict())
            files.write_json(workdir / DATA, data)
        yield there, check
