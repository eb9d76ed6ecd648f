"""The straight path that each stage follows, from its noisy start to its end, for a known clean image.

Source: PixelFlow (arXiv 2504.07963), section 3.1. For a clean image x1, one noise e shared by both ends,
and Down/Up as in images.py, stage s of S runs from
    x_start = start * Up(Down^(S-s)(x1)) + (1 - start) * e      (stage 0: pure e)
    x_end   = end * Down^(S-1-s)(x1) + (1 - end) * e
along x_tau = tau * x_end + (1 - tau) * x_start, with the velocity x_end - x_start.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.stages import NUM_TRAIN_TIMES, Cascade


def stage_ends(
    cascade: Cascade, stage: int, x1: Float[Array, "*b h w c"], noise: Float[Array, "*b hs ws c"]
) -> tuple[Float[Array, "*b hs ws c"], Float[Array, "*b hs ws c"]]:
    """Return (x_start, x_end) of one stage for clean images at full size; noise has the stage's size."""
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
    """Return (x_tau, velocity, T) at one stage, for clean images at full size in [-1, 1].

    noise has the stage's size. The index i in 0..999 sets tau = i/1000 and T = timesteps[stage][i].
    """
    x_start, x_end = stage_ends(cascade, stage, x1, noise)
    tau = (time_index.astype(x1.dtype) / NUM_TRAIN_TIMES)[..., None, None, None]
    timestep = jnp.asarray(cascade.timesteps[stage], x1.dtype)[time_index]
    return tau * x_end + (1 - tau) * x_start, x_end - x_start, timestep
