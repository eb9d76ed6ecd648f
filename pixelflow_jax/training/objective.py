"""The flow-matching objective over the cascade, computed on the device inside the train step.

Source: PixelFlow (arXiv 2504.07963), section 3.1; see cascade/paths.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.packing import PackLayout, cascade_layout
from pixelflow_jax.cascade.paths import corrupt_stage
from pixelflow_jax.cascade.stages import NUM_TRAIN_TIMES, Cascade
from pixelflow_jax.common import numerics
from pixelflow_jax.models.conditioning import Condition

Tokens = list[Float[Array, "rows count length d"]]  # one array per group of a layout


class FlowBatch(NamedTuple):
    """Inputs and targets of the network; sequences of the same stage form a group."""

    tokens: Tokens
    target: Tokens
    timesteps: Float[Array, "rows s"]
    condition: Condition  # leaves [rows, s, ...]


def corrupt(
    cascade: Cascade,
    patch_size: int | Sequence[int],
    x1: Float[Array, "rows b h w c"],
    condition: Condition,
    keys: Key[Array, "rows b"],
    num_classes: int,
    label_dropout: float,
) -> tuple[FlowBatch, PackLayout]:
    """Draw noise, time and label dropout per image from its own key, and cut the images into tokens.

    Image i of a row is trained at stage i mod S. What an image gets depends on its key and stage alone,
    not on the batch around it. Raises ValueError if b is not a multiple of S.

    Args:
      cascade, patch_size: the stages, and one patch size for all or one each.
      x1: clean images in [-1, 1].
      condition: leaves [rows, b, ...]. Only "labels" are dropped here; the loader drops captions, before
        they become numbers. The tau of an image with an "interval", in thousandths of its stage, is
        rounded down to a multiple of it.
      keys: one per image.
      num_classes: the label of the null class, which replaces dropped ones.
      label_dropout: the probability of that.
    """
    per_row, num_stages, channels = x1.shape[1], cascade.num_stages, x1.shape[-1]
    if per_row % num_stages:
        raise ValueError(f"{per_row} images per row cannot be split evenly over {num_stages} stages")
    counts = dict.fromkeys(range(num_stages), per_row // num_stages)
    layout = cascade_layout(cascade, counts, *x1.shape[2:4], patch_size)

    tokens, target, timesteps, conditions = [], [], [], []
    for stage, group in enumerate(layout.groups):
        mine = slice(stage, None, num_stages)
        shape = (*cascade.size(stage, *x1.shape[2:4]), channels)
        noise, time_index, drop = _draw(keys[:, mine], shape, label_dropout)
        kept = {name: x[:, mine] for name, x in condition.items()}
        if "interval" in kept:
            time_index -= time_index % jnp.maximum(kept["interval"], 1).astype(int)
        x_tau, velocity, timestep = corrupt_stage(cascade, stage, x1[:, mine], noise, time_index)
        tokens.append(images.patchify(x_tau, group.patch_size))
        target.append(images.patchify(velocity, group.patch_size))
        timesteps.append(timestep)
        if "labels" in kept:
            kept["labels"] = jnp.where(drop, num_classes, kept["labels"])
        conditions.append(kept)

    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *conditions)
    return FlowBatch(tokens, target, jnp.concatenate(timesteps, axis=1), joined), layout


@numerics.pinned()
def _draw(keys: Key[Array, "rows b"], shape: tuple[int, ...], label_dropout: float):
    """Return (noise, time index, whether to drop the label) for each key."""

    def one(key):
        for_noise, for_time, for_drop = jax.random.split(key, 3)
        return (
            jax.random.normal(for_noise, shape),
            jax.random.randint(for_time, (), 0, NUM_TRAIN_TIMES),
            jax.random.bernoulli(for_drop, label_dropout),
        )

    return jax.vmap(jax.vmap(one))(keys)


def loss_per_image(layout: PackLayout, velocity: Tokens, target: Tokens) -> Float[Array, "rows s"]:
    """Return the mean squared error over each image's own tokens and channels.

    The loss is the mean over images: a 64-token image weighs as much as a 4096-token one. Where devices
    share the tokens of an image, this is the device's share of the mean.
    """
    means = []
    pairs = zip(layout.by_patch_size(velocity), layout.by_patch_size(target), strict=True)
    for (_, run, ours), (*_, theirs) in pairs:
        # Rows as in the head, so that XLA fuses with its product
        error = jnp.square(run.pack(ours) - run.pack(theirs))
        means += [part.mean(axis=(2, 3)) / layout.shards for part in run.unpack(error)]
    return jnp.concatenate(means, axis=1)
