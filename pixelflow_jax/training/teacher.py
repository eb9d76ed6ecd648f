"""The teacher of a distillation: frozen parameters, which a run recognizes by their digest."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_cascade, build_model
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import Condition, abstract_params
from pixelflow_jax.models.lora import abstract_adapters
from pixelflow_jax.text.encoder import make_text_reader
from pixelflow_jax.training.optimizer import is_matrix
from pixelflow_jax.training.start import check_meaning, check_shapes, initial_params
from pixelflow_jax.training.step import abstract_condition


def read_teacher(config: ConfigDict) -> dict | None:
    """Return the frozen parameters of a run, in each host's memory; None if there are none.

    They are those of a student's teacher, or those that adapters are added to. Raises UserError if they
    cannot be read, do not fit the config's model and cascade, or are a student's.
    """
    key, path = "distill.teacher", config.distill.teacher
    if config.lora.rank:
        key, path = "init_from", config.init_from
        abstract_adapters(build_model(config), config.lora.rank)  # or say that the rank is too large
    if not path:
        return None
    params, was = initial_params(key, path)
    if was.distill.teacher:
        raise UserError(f"config.{key}={path} is distilled itself: name the model that it learned from")
    check_shapes(params, abstract_teacher(config), f"config.{key}={path}")
    check_meaning(config, was, key, path)
    cascade = build_cascade(was)
    if build_cascade(config) != cascade:
        raise UserError(f"config.cascade is not that of config.{key}={path}: {cascade}")
    return jax.tree.map(np.asarray, params)  # kept for the whole run: not on a device


def abstract_teacher(config: ConfigDict) -> dict:
    """Return the shapes and dtypes of the parameters of a config's teacher."""
    return abstract_params(build_model(config).clone(intervals=False))


def abstract_frozen(config: ConfigDict, mesh: Mesh) -> dict[str, Any] | None:
    """Return the shapes, dtypes and shardings of what `freeze` returns.

    The matrices of the teacher are in the dtype of the computation.
    """
    if config.lora.rank:
        return {"base": sharding.abstract(abstract_params(build_model(config)), mesh)}
    if not config.distill.teacher:
        return None
    teacher, dtype = abstract_teacher(config), build_model(config).dtype
    null = abstract_condition(config, 1)

    def one(x, where, dtype):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=where)

    dtypes = jax.tree.map(lambda x, matrix: dtype if matrix else x.dtype, teacher, is_matrix(teacher))
    whole = NamedSharding(mesh, P())
    return {
        "teacher": jax.tree.map(one, teacher, sharding.shardings(teacher, mesh), dtypes),
        "null": jax.tree.map(lambda x: one(x, whole, x.dtype), null),
    }


def freeze(
    config: ConfigDict, teacher: dict | None, mesh: Mesh, encode: Callable[[dict], dict]
) -> dict[str, Any] | None:
    """Return what a train step needs of frozen parameters, on the mesh; None without any.

    "null" is the condition of its unconditional half; `encode` replaces token ids by text states.
    """
    if teacher is None:
        return None
    shapes = abstract_frozen(config, mesh)
    if config.lora.rank:
        given = {"base": teacher}
    else:
        given = {"teacher": teacher, "null": null_condition(config, mesh, encode)}
    cast = jax.tree.map(lambda x, shape: x.astype(shape.dtype), given, shapes)
    return sharding.placed(cast, jax.tree.map(lambda shape: shape.sharding, shapes))


def null_condition(config: ConfigDict, mesh: Mesh, encode: Callable[[dict], dict]) -> Condition:
    """Return the condition of one image without a class or text, leaves [1, ...], on the host."""
    if not config.model.context_dim:
        return {"labels": np.full((1,), config.model.num_classes, np.int32)}
    split, count = NamedSharding(mesh, sharding.BATCH), sharding.batch_shards(mesh)
    texts = make_text_reader(config)([""] * len(sharding.local_rows(split, count)))
    batch = encode(sharding.place_batch(texts, split, count))
    first = jax.jit(lambda x: jax.tree.map(lambda y: y[:1], x), out_shardings=NamedSharding(mesh, P()))
    return jax.tree.map(np.asarray, first(batch))
