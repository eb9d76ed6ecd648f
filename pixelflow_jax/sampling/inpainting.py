"""Inpainting: some pixels of a given image are kept, and the sampler draws the rest to fit them.

Before every step, and at the end of every stage, the kept pixels are put back as the point that the
given image has then reached on its own path (cascade/paths.py), with noise that the whole stage shares.
With `Sampler.resample`, every step is taken several times, with new noise in between, so that the new
part adapts to the kept one (RePaint, arXiv 2201.09865).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.paths import stage_ends
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import numerics


class Given(NamedTuple):
    """What is given of each image.

    Attributes:
      clean: the images at full size, in [-1, 1].
      kept: True at pixels that stay as they are.
      noise: white noise of the first stage that is run.
      keys: one per image, for the noise between repeated steps.
    """

    clean: Float[Array, "b h w c"]
    kept: Bool[Array, "b h w 1"]
    noise: Float[Array, "b hs ws c"]
    keys: Key[Array, " b"]


@dataclasses.dataclass(frozen=True)
class GivenAtStage:
    """What is given, at the size of one stage; a coarse pixel is kept if all pixels below it are.

    Attributes:
      start, end: the stage's window of time; `start` is 0 at the first stage.
      x_start, x_end: the ends of the given images' paths.
      kept: True at pixels that stay on these paths.
      keys: one per image, of this stage.
    """

    start: float
    end: float
    x_start: Float[Array, "b h w c"]
    x_end: Float[Array, "b h w c"]
    kept: Bool[Array, "b h w 1"]
    keys: Key[Array, " b"]

    def put_back(self, x: Float[Array, "b h w c"], tau: Float[Array, ""]) -> Float[Array, "b h w c"]:
        """Return x with the kept pixels at `tau` on their path."""
        return jnp.where(self.kept, tau * self.x_end + (1 - tau) * self.x_start, x)

    def part(self, number: int) -> "GivenAtStage":
        """Return the same with other keys, for a part of the stage."""
        return dataclasses.replace(self, keys=_folded(self.keys, number))

    @numerics.pinned()
    def back(
        self,
        x: Float[Array, "b h w c"],
        late: Float[Array, ""],
        early: Float[Array, ""],
        number: Int[Array, ""],
    ) -> Float[Array, "b h w c"]:
        """Return a point at tau `early` from which x, at `late`, may have come; `number` draws anew.

        On the path, the mean of a 2x2 block of the image has the weight t = tau end + (1 - tau) start,
        the rest tau end, and the noise 1 - t. So the two parts are scaled by the ratios of their
        weights, and each receives the noise that it then lacks.
        """
        t_late, t_early = (tau * self.end + (1 - tau) * self.start for tau in (late, early))
        draw = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))
        noise = draw(_folded(self.keys, number)).astype(x.dtype)

        def scaled(part, noise, ratio):
            missing = jnp.square(1 - t_early) - jnp.square(ratio * (1 - t_late))
            return ratio * part + jnp.sqrt(jnp.maximum(missing, 0)) * noise

        if not self.start:  # both ratios are equal, and the sides may be odd
            return scaled(x, noise, early / late)
        mean, its_noise = (images.up(images.down(y)) for y in (x, noise))
        coarse = scaled(mean, its_noise, t_early / t_late)
        return coarse + scaled(x - mean, noise - its_noise, early / late)


def at_stage(
    given: Given, cascade: Cascade, blocks: list[Float[Array, "b hs ws c"]], first: int, stage: int
) -> GivenAtStage:
    """Return what is given at a stage of a run that begins at stage `first`.

    The noise follows the sample's over each step up, where x <- alpha Up(x) + beta n: what was
    (1 - end) e before becomes (1 - start) e' (cascade/renoising.py).
    """
    noise = given.noise
    for s in range(first + 1, stage + 1):
        alpha, beta = cascade.renoising(s)
        noise = alpha * (1 - cascade.end[s - 1]) * images.up(noise) + beta * blocks[s - 1]
        noise /= 1 - cascade.start[s]
    x_start, x_end = stage_ends(cascade, stage, given.clean, noise)
    share = images.down(given.kept.astype(noise.dtype), cascade.num_stages - 1 - stage)
    keys = _folded(given.keys, cascade.num_stages + stage)  # the first numbers draw the stages' noise
    return GivenAtStage(cascade.start[stage], cascade.end[stage], x_start, x_end, share == 1, keys)


def _folded(keys: Key[Array, " b"], number: int | Int[Array, ""]) -> Key[Array, " b"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
