"""The teacher of a distillation: frozen parameters, which a run recognizes by their digest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from pixelflow_jax.config import build_model
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import Condition, abstract_params
from pixelflow_jax.text.encoder import make_text_reader
from pixelflow_jax.training.optimizer import is_matrix
from pixelflow_jax.training.start import check_shapes, initial_params, placed


def read_teacher(config: ConfigDict) -> dict | None:
    """Return the parameters of a config's teacher, whole on each host; None without a teacher.

    Raises UserError if they cannot be read, or do not fit the config's model.
    """
    path = config.distill.teacher
    if not path:
        return None
    params = initial_params("distill.teacher", path)
    check_shapes(params, abstract_params(build_model(config).clone(intervals=False)), "distill.teacher", path)
    return params


def freeze(
    config: ConfigDict, teacher: dict | None, mesh: Mesh, encode: Callable[[dict], dict]
) -> dict[str, Any] | None:
    """Return what a train step needs of a teacher, on the mesh; None without a teacher.

    Its matrices are in the dtype of the computation. "null" is the condition of its unconditional half.
    """
    if teacher is None:
        return None
    dtype = build_model(config).dtype

    def cast(x, matrix):
        return jnp.asarray(x, dtype) if matrix else x

    params = jax.tree.map(cast, teacher, is_matrix(teacher))
    params = placed(params, sharding.shardings(params, mesh))
    null = null_condition(config, mesh, encode)
    return {"teacher": params, "null": placed(null, jax.tree.map(lambda _: NamedSharding(mesh, P()), null))}


def null_condition(config: ConfigDict, mesh: Mesh, encode: Callable[[dict], dict]) -> Condition:
    """Return the condition of one unconditional image, on the host; `encode` replaces token ids."""
    if not config.model.context_dim:
        return {"labels": np.full((1,), config.model.num_classes, np.int32)}
    split, count = NamedSharding(mesh, sharding.BATCH), sharding.batch_shards(mesh)
    texts = make_text_reader(config)([""] * count)
    whole = jax.jit(encode, out_shardings=NamedSharding(mesh, P()))
    return jax.tree.map(lambda x: np.asarray(x[:1]), whole(sharding.place_batch(texts, split, count)))
