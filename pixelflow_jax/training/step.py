"""The train state and the compiled train step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.packing import CONTEXT, PackLayout
from pixelflow_jax.common import numerics
from pixelflow_jax.common.hardware import platform_of
from pixelflow_jax.config import build_cascade, build_model
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models import lora
from pixelflow_jax.models.conditioning import INTERVAL, abstract_params, encode_text
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.training import objective
from pixelflow_jax.training.distillation import build_distillation, interval_lengths


@flax.struct.dataclass
class TrainState:
    """What changes from step to step; the seed and the data are in the config."""

    step: Array  # int32: the number of updates so far
    params: dict
    opt_state: dict  # "clip", "adamw" or "muon", and "ema", see optimizer.py


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_trained(config: ConfigDict, model: PixelFlow) -> dict:
    """Return the shapes and dtypes of what a run trains: all parameters, or adapters (lora.py)."""
    rank = config.lora.rank
    return lora.abstract_adapters(model, rank) if rank else abstract_params(model)


def abstract_state(
    config: ConfigDict, model: PixelFlow, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Return the shapes, dtypes and shardings of a run's state, without allocating it."""
    trained = abstract_trained(config, model)
    return sharding.abstract(jax.eval_shape(lambda params: init_state(params, optimizer), trained), mesh)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes, dtypes and shardings of a global batch of squares."""
    size, side = config.batch_size, config.data.resolution
    where = NamedSharding(mesh, sharding.BATCH)
    shapes = {"image": ((size, side, side, 3), jnp.uint8), "broken": ((size,), jnp.int32)}
    shapes |= {name: (x.shape, x.dtype) for name, x in abstract_condition(config, size).items()}
    return {name: jax.ShapeDtypeStruct(*shape, sharding=where) for name, shape in shapes.items()}


def abstract_condition(config: ConfigDict, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of the condition of `size` images."""
    length, width = config.text.max_length, config.model.context_dim
    if config.text.encoder == "joint":
        shapes = {"text_ids": ((size, length), jnp.int32), "text_mask": ((size, length), bool)}
    elif width:
        states = (size, length, width), build_model(config).dtype
        shapes = {"context": states, "context_mask": ((size, length), bool)}
    else:
        shapes = {"labels": ((size,), jnp.int32)}
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def packed_loss(
    model: PixelFlow, params: dict, batch: objective.FlowBatch, layout: PackLayout
) -> Float[Array, "rows s"]:
    """Return the loss of every image in a batch."""
    condition = encode_text(model, params, batch.condition)
    velocity = model.apply({"params": params}, batch.tokens, batch.timesteps, layout, **condition)
    return objective.loss_per_image(layout, velocity, batch.target)


def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, grads: dict
) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after an update, and the norms of the gradient and of the new parameters."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    return TrainState(state.step + 1, params, opt_state), norms


def make_loss_and_grads(config: ConfigDict, model: PixelFlow, mesh: Mesh) -> Callable:
    """Return a function of (params, batch, step key) that returns (mean loss per stage [S], gradients).

    It also takes what `teacher.freeze` returns: for adapters, the frozen parameters; for a student, its
    teacher, with the student's average.

    It runs under shard_map. A device packs its share of the images into one row per accumulation step;
    devices along the axis `context` hold the same images, and each a part of their tokens. Image i of
    the batch has the key fold_in(step key, i) and the stage i mod S, on any mesh.
    """
    cascade, parts, total = build_cascade(config), config.accumulation_steps, config.batch_size
    num_stages, shards = cascade.num_stages, mesh.shape[CONTEXT]
    specs = sharding.specs(abstract_params(model), mesh)
    trained_specs = sharding.specs(abstract_trained(config, model), mesh)
    model = model.clone(platform=platform_of(mesh.devices.flat[0]))
    if mesh.shape["fsdp"] > 1:
        model = model.clone(gather_layer=sharding.layer_gather(specs[sharding.SCANNED], model.dtype))

    distillation = build_distillation(config, model) if config.distill.teacher else None
    of_teacher = {name: spec for name, spec in specs.items() if name != INTERVAL}
    given_specs = {"average": specs, "teacher": of_teacher, "null": P()} if distillation else {}
    if config.lora.rank:
        given_specs = {"base": specs}

    def row_loss(params, batch, keys, given):
        """Return (loss summed over a device's images, sum per stage), as shares of the batch mean."""
        if config.lora.rank:
            params = lora.merged_shards(given["base"], params, specs, trained_specs)
        params = sharding.gather_rest(params, specs, model.dtype)
        batch = {name: x[None] for name, x in batch.items()}  # a row
        packed, layout = objective.corrupt(
            cascade,
            model.patch_size,
            images.from_uint8(batch["image"]),
            {name: x for name, x in batch.items() if name != "image"},
            keys[None],
            model.num_classes,
            config.data.label_dropout,
        )
        layout = dataclasses.replace(layout, shards=shards)
        tokens, target = ([*map(layout.local, x)] for x in (packed.tokens, packed.target))
        packed = packed._replace(tokens=tokens, target=target)
        if distillation:
            average, teacher = (
                sharding.gather_rest(given[name], given_specs[name], model.dtype)
                for name in ("average", "teacher")
            )
            packed = distillation.retarget(packed, layout, average, teacher, given["null"])
        per_image = packed_loss(model, params, packed, layout)
        stages = jnp.stack([part.sum() for part in layout.split_sequences(per_image)])
        return per_image.sum() / total, stages * num_stages / total

    def local(params, batch, index, step_key, given):
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)
        if distillation:
            batch = {**batch, "interval": interval_lengths(num_stages, index)}

        def grad_fn(*args):
            with numerics.precision(model.dtype):  # for kernels with a custom backward pass
                return jax.value_and_grad(row_loss, has_aux=True)(*args, given)

        stages, grads = _accumulated(grad_fn, params, (batch, keys), parts)
        return jax.lax.psum(stages, mesh.axis_names), sharding.reduce_gradients(grads, trained_specs)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(trained_specs, sharding.BATCH, sharding.BATCH, P(), given_specs),
        out_specs=(P(), trained_specs),
        check_vma=False,  # reduce_gradients contains the sums over the mesh
    )

    def loss_and_grads(params: dict, batch: dict[str, Array], step_key: Key[Array, ""], given=None):
        return mapped(params, batch, jnp.arange(total), step_key, given or {})

    return loss_and_grads


def _accumulated(grad_fn: Callable, params: dict, data: Any, parts: int) -> tuple[Array, dict]:
    """Return (sum per stage, gradients), summed over `parts` of a device's images in turn."""

    def one(part):
        (_, stages), grads = grad_fn(params, *part)
        return stages, grads

    if parts == 1:
        return one(data)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), data)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, jax.tree.map(lambda x: x[0], split)))
    return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, one(x)), None), zeros, split)[0]


def make_train_step(
    config: ConfigDict, model: PixelFlow, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Return the jitted step: corruption, packing, forward and backward pass, and update.

    Its batch has "image" (uint8), "broken" and the condition, as global arrays (see data/loader.py). It
    is compiled once per image size. `broken` is passed through, so that every process sees all of it.
    """
    loss_and_grads = make_loss_and_grads(config, model, mesh)
    root = jax.random.fold_in(numerics.key(config.seed), 1)  # the init uses the unfolded key
    everywhere = NamedSharding(mesh, P())

    def train_step(state, batch, frozen=None):
        step_key = jax.random.fold_in(root, state.step)
        broken, batch = batch["broken"], {name: x for name, x in batch.items() if name != "broken"}
        given = frozen
        if config.distill.teacher:
            given = {**frozen, "average": state.opt_state["ema"].averages[0]}
        stages, grads = loss_and_grads(state.params, batch, step_key, given)
        state, norms = apply_gradients(optimizer, state, grads)
        metrics = {"loss": stages.mean(), "loss_per_stage": stages, **norms}
        return state, {**metrics, "broken": broken}

    state = abstract_state(config, model, optimizer, mesh)
    out = jax.tree.map(lambda x: x.sharding, state), everywhere
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)
