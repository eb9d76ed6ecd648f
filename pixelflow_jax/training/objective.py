"""The flow-matching objective over the cascade, computed on the device inside the train step.

Source: PixelFlow (arXiv 2504.07963), section 3.1. For a clean image x1, one noise e shared by both
ends and down/up as in images.py, stage s runs from
    x_start = start * Up(Down^(S-s)(x1)) + (1 - start) * e      (stage 0: pure e)
    x_end   = end * Down^(S-1-s)(x1) + (1 - end) * e
along x_tau = tau * x_end + (1 - tau) * x_start, and the target is the velocity x_end - x_start.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.packing import Group, PackLayout, Rows, join_runs, map_runs
from pixelflow_jax.cascade.stages import NUM_TRAIN_TIMES, Cascade
from pixelflow_jax.common import numerics
from pixelflow_jax.models.conditioning import Condition


class FlowBatch(NamedTuple):
    """Packed inputs and targets of the network; sequences of the same stage stand together."""

    tokens: Rows
    target: Rows
    timesteps: Float[Array, "rows s"]
    condition: Condition  # leaves [rows, s, ...]


def train_layout(
    cascade: Cascade,
    counts: tuple[int, ...],
    height: int,
    width: int,
    patch_size: int | Sequence[int],
) -> PackLayout:
    """Layout of a training row with counts[s] images at stage s; height and width in pixels."""
    cascade.check_size(height, width, patch_size)
    patches = cascade.patches(patch_size)
    sizes = [cascade.size(stage, height, width) for stage in range(cascade.num_stages)]
    return PackLayout(
        tuple(
            Group(count, h // p, w // p, p // min(patches))
            for count, (h, w), p in zip(counts, sizes, patches, strict=True)
        )
    )


def stage_ends(
    cascade: Cascade, stage: int, x1: Float[Array, "*b h w c"], noise: Float[Array, "*b hs ws c"]
) -> tuple[Float[Array, "*b hs ws c"], Float[Array, "*b hs ws c"]]:
    """(x_start, x_end) of one stage for clean images at full size; noise has the stage's size."""
    start, end = cascade.start[stage], cascade.end[stage]
    clean = images.down(x1, cascade.num_stages - 1 - stage)
    x_end = end * clean + (1 - end) * noise
    if stage == 0:
        return noise, x_end
    return start * images.up(images.down(clean)) + (1 - start) * noise, x_end


def corrupt_stage(
    cascade: Cascade,
    stage: int,
    x1: Float[Array, "*b h w c"],
    noise: Float[Array, "*b hs ws c"],
    time_index: Int[Array, "*b"],
) -> tuple[Float[Array, "*b hs ws c"], Float[Array, "*b hs ws c"], Float[Array, "*b"]]:
    """(x_tau, velocity, T) at one stage, for clean images at full size in [-1, 1].

    noise has the stage's size; time_index i in 0..999 sets tau = i/1000 and T = table[stage][i].
    """
    x_start, x_end = stage_ends(cascade, stage, x1, noise)
    tau = (time_index.astype(x1.dtype) / NUM_TRAIN_TIMES)[..., None, None, None]
    timestep = jnp.asarray(cascade.timesteps[stage], x1.dtype)[time_index]
    return tau * x_end + (1 - tau) * x_start, x_end - x_start, timestep


def corrupt(
    cascade: Cascade,
    patch_size: int | Sequence[int],
    x1: Float[Array, "rows b h w c"],
    condition: Condition,
    keys: Key[Array, "rows b"],
    num_classes: int,
    label_dropout: float,
) -> tuple[FlowBatch, PackLayout]:
    """Draws noise, time and label dropout per image from its own key, and packs the rows.

    `condition` has leaves [rows, b, ...]; of these only "labels" are dropped here (texts are in the
    loader, before they become numbers).

    Image i of a row is trained at stage i mod S, so b must be a multiple of S. What an image gets
    depends on its key and stage alone, not on the batch around it.
    """
    per_row, num_stages, channels = x1.shape[1], cascade.num_stages, x1.shape[-1]
    if per_row % num_stages:
        raise ValueError(f"{per_row} images a row do not split over {num_stages} stages")
    counts = (per_row // num_stages,) * num_stages
    layout = train_layout(cascade, counts, *x1.shape[2:4], patch_size)

    tokens, target, timesteps, conditions = [], [], [], []
    for stage in range(num_stages):
        mine = slice(stage, None, num_stages)
        shape = (*cascade.size(stage, *x1.shape[-3:-1]), channels)
        noise, time_index, drop = _draw(keys[:, mine], shape, label_dropout)
        x_tau, velocity, timestep = corrupt_stage(cascade, stage, x1[:, mine], noise, time_index)
        count = per_row // num_stages
        for parts, x in ((tokens, x_tau), (target, velocity)):
            patches = images.patchify(x, cascade.patches(patch_size)[stage])
            parts.append(patches.reshape(len(x), count, -1, patches.shape[-1]))
        timesteps.append(timestep)
        kept = {name: x[:, mine] for name, x in condition.items()}
        if "labels" in kept:
            kept["labels"] = jnp.where(drop, num_classes, kept["labels"])
        conditions.append(kept)

    def packed(parts):
        parts = iter(parts)
        return map_runs(lambda run: run.pack(list(itertools.islice(parts, run.num_groups))), layout)

    batch = FlowBatch(
        packed(tokens),
        packed(target),
        jnp.concatenate(timesteps, axis=1),
        jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *conditions),
    )
    return batch, layout


@numerics.pinned()
def _draw(keys: Key[Array, "rows b"], shape: tuple[int, ...], label_dropout: float):
    """(noise, time index, whether to drop the label) for each key."""

    def one(key):
        for_noise, for_time, for_drop = jax.random.split(key, 3)
        return (
            jax.random.normal(for_noise, shape),
            jax.random.randint(for_time, (), 0, NUM_TRAIN_TIMES),
            jax.random.bernoulli(for_drop, label_dropout),
        )

    return jax.vmap(jax.vmap(one))(keys)


def loss_per_image(
    layout: PackLayout,
    velocity: Rows,
    target: Rows,
) -> Float[Array, "rows s"]:
    """Mean squared error over each image's own tokens and channels, in at least float32.

    The mean over images is the loss: a 64-token image weighs as much as a 4096-token one.
    """

    def one(run, velocity, target):
        error = velocity.astype(jnp.promote_types(velocity.dtype, jnp.float32)) - target
        return run.sequence_means(jnp.square(error))

    return join_runs(map_runs(one, layout, velocity, target))
