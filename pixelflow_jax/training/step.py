"""The train state and the compiled train step."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from pixelflow_jax import flow, images
from pixelflow_jax.config import build_cascade
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.packing import Group, PackLayout


@flax.struct.dataclass
class TrainState:
    """All that a run carries from step to step; the seed and the data are in the config."""

    step: Array  # int32: updates done so far
    params: dict
    opt_state: dict  # {"clip", "adamw", "ema"}, see optimizer.py


def init_params(model: PixelFlow, seed: int) -> dict:
    """Fresh parameters. They do not depend on the sizes of the layout they are traced with."""
    layout = PackLayout((Group(1, 1, 1),))
    tokens = jnp.zeros((1, 1, 3 * model.patch_size**2))
    labels = jnp.zeros((1, 1), jnp.int32) if model.num_classes else None
    context = jnp.zeros((1, 1, 1, model.context_dim)) if model.context_dim else None
    mask = jnp.ones((1, 1, 1), bool) if model.context_dim else None
    key = jax.random.key(seed)
    return model.init(key, tokens, jnp.zeros((1, 1)), layout, labels, context, mask)["params"]


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def packed_loss(
    model: PixelFlow, params: dict, batch: flow.FlowBatch, layout: PackLayout
) -> Float[Array, "rows s"]:
    """The loss of every image of a packed batch."""
    velocity = model.apply({"params": params}, batch.tokens, batch.timesteps, layout, batch.labels)
    return flow.loss_per_image(layout, velocity, batch.target)


def update(
    model: PixelFlow,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: flow.FlowBatch,
    layout: PackLayout,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on a packed batch; returns the new state and the metrics."""

    def loss_fn(params):
        per_image = packed_loss(model, params, batch, layout)
        return per_image.mean(), per_image

    (loss, per_image), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": loss,
        "loss_per_stage": jnp.stack([part.mean() for part in layout.split_sequences(per_image)]),
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(params),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def make_train_step(
    config: ConfigDict, model: PixelFlow, optimizer: optax.GradientTransformation, rows: int = 1
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """The jitted step: uint8 batch in, corruption, packing, forward, backward and update inside.

    batch is {"image": uint8 [B, H, W, 3], "label": int32 [B]}. Image i of the batch has the key
    fold(seed, step, i) and the stage i mod S; the B images split evenly over `rows` packed rows.
    """
    cascade = build_cascade(config)
    root = jax.random.fold_in(jax.random.key(config.seed), 1)  # init has the unfolded key

    def train_step(state, batch):
        size = len(batch["label"])
        step_key = jax.random.fold_in(root, state.step)
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(jnp.arange(size))
        x1 = images.from_uint8(batch["image"])
        flow_batch, layout = flow.corrupt(
            cascade,
            model.patch_size,
            x1.reshape(rows, size // rows, *x1.shape[1:]),
            batch["label"].reshape(rows, size // rows),
            keys.reshape(rows, size // rows),
            model.num_classes,
            config.data.label_dropout,
        )
        return update(model, optimizer, state, flow_batch, layout)

    return jax.jit(train_step, donate_argnums=0)
