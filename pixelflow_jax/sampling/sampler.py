"""From noise to images, stage by stage: the whole cascade in one function that compiles once.

Source: PixelFlow (arXiv 2504.07963), section 3.3. Within a stage an ODE solver follows the velocity
from tau 0 to 1; between stages x <- alpha * Up(x) + beta * n, where n is noise correlated within
each 2x2 block such that mean and variance fit the window of the next stage.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from pixelflow_jax import images
from pixelflow_jax.cascade import Cascade
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.packing import Group, PackLayout
from pixelflow_jax.sampling.grids import StageGrid, TimeGrid
from pixelflow_jax.sampling.guidance import Guidance
from pixelflow_jax.sampling.solvers import ADAPTIVE, check_solver, solve_adaptive, solve_fixed

# What the network is conditioned on, by argument name of PixelFlow.__call__; first axis is the image.
Condition = dict[str, Array]


class Noise(NamedTuple):
    """All randomness of a sample: the start, and one block noise for each step up a stage."""

    start: Float[Array, "b h w c"]
    blocks: list[Float[Array, "b hs ws c"]]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The settings of a sampling run; call `sample` under jit.

    Attributes:
      model, cascade: the network and its stages.
      height, width: of the final image, in pixels.
      grid, guidance, solver: see grids.py, guidance.py, solvers.py.
      rtol, atol: tolerances of adaptive solvers, per image.

    Raises:
      UserError: for sizes, solvers, grids or schedules that do not fit the cascade.
    """

    model: PixelFlow
    cascade: Cascade
    height: int
    width: int
    grid: TimeGrid = TimeGrid()
    guidance: Guidance = Guidance()
    solver: str = "euler"
    rtol: float = 1e-3
    atol: float = 1e-6

    def __post_init__(self):
        self.cascade.check_size(self.height, self.width, self.model.patch_size)
        check_solver(self.solver)
        self.grid.steps(self.cascade.num_stages)
        self.guidance.weights(self.cascade.num_stages)

    def draw_noise(self, keys: Key[Array, " b"]) -> Noise:
        """Noise for each image from its own key, so that it does not depend on the batch."""

        def normal(stage):
            shape = (*self.cascade.size(stage, self.height, self.width), 3)
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stage), shape))(keys)

        gamma = self.cascade.gamma
        later = range(1, self.cascade.num_stages)
        return Noise(normal(0), [correlate_blocks(normal(stage), gamma) for stage in later])

    def sample(
        self, params: dict, noise: Noise, condition: Condition, null_condition: Condition
    ) -> list[Float[Array, "b hs ws c"]]:
        """The image at the end of every stage; the last is the sample, about in [-1, 1].

        Args:
          params: of the model.
          noise: from `draw_noise`.
          condition, null_condition: {"labels": int [B]}, or {"context": [B, t, c],
            "context_mask": bool [B, t]}; the second is what the unconditional half sees.
        """
        x, ends = noise.start, []
        weights = self.guidance.weights(self.cascade.num_stages)
        for stage in range(self.cascade.num_stages):
            if stage:
                alpha, beta = self.cascade.renoising(stage)
                x = alpha * images.up(x) + beta * noise.blocks[stage - 1]
            grid = self.grid.stage(self.cascade, stage, self.solver in ADAPTIVE)
            x = self._solve(params, x, grid, weights[stage], condition, null_condition)
            ends.append(x)
        return ends

    def _solve(self, params, x, grid: StageGrid, weight: float, condition, null_condition):
        """Integrates one stage."""
        if self.solver in ADAPTIVE:
            one = functools.partial(self._solve_one, params, grid, weight)
            return jax.vmap(one)(x, condition, null_condition)
        for part, guided in self._parts(grid):
            field = self._field(params, grid, weight if guided else 1.0, condition, null_condition)
            x = solve_fixed(self.solver, field, x, part)
        return x

    def _solve_one(self, params, grid: StageGrid, weight: float, x, condition, null_condition):
        """Integrates one stage of one image adaptively: its steps do not depend on its batch."""
        batch_of_one = jax.tree.map(lambda leaf: leaf[None], (condition, null_condition))
        guided = self._field(params, grid, weight, *batch_of_one)
        plain = self._field(params, grid, 1.0, *batch_of_one)

        def field(x, tau):
            if weight == 1 or self.guidance.always:
                return guided(x[None], tau)[0]
            active = self.guidance.active(grid.timestep(tau))
            return jnp.where(active, guided(x[None], tau), plain(x[None], tau))[0]

        return solve_adaptive(self.solver, field, x, self.rtol, self.atol)

    def _parts(self, grid: StageGrid) -> list[tuple[StageGrid, bool]]:
        """Cuts a grid where guidance goes on or off, by the time at the start of each step."""
        on = self.guidance.active(np.array([grid.timestep(tau) for tau in grid.taus[:-1]]))
        cuts = [0, *(np.flatnonzero(np.diff(on)) + 1).tolist(), len(on)]
        return [
            (dataclasses.replace(grid, taus=grid.taus[begin : end + 1]), bool(on[begin]))
            for begin, end in zip(cuts[:-1], cuts[1:], strict=True)
        ]

    def _field(self, params, grid: StageGrid, weight: float, condition, null_condition) -> Callable:
        """The guided velocity at (x [B, h, w, c], tau). A row holds one image, or its two halves."""
        both = weight != 1
        pair = (null_condition, condition) if both else (condition,)
        inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *pair)

        def field(x, tau):
            p = self.model.patch_size
            batch, height, width, _ = x.shape
            layout = PackLayout((Group(len(pair), height // p, width // p),))
            tokens = images.patchify(x, p)
            timesteps = jnp.full((batch, len(pair)), grid.timestep(tau), x.dtype)
            out = self.model.apply(
                {"params": params},
                jnp.tile(tokens, (1, len(pair), 1)),
                timesteps,
                layout,
                **inputs,
            )
            out = out.astype(x.dtype)
            if both:
                uncond, cond = jnp.split(out, 2, axis=1)
                out = uncond + weight * (cond - uncond)
            return images.unpatchify(out, height, width, p)

        return field


def correlate_blocks(z: Float[Array, "b h w c"], gamma: float) -> Float[Array, "b h w c"]:
    """White noise to noise with covariance (1 - gamma) I + gamma 11^T within each 2x2 block.

    The covariance has the eigenvalue 1 - gamma off the block's mean and 1 + 3 gamma along it, so at
    gamma = -1/3 the mean vanishes: sqrt(4/3) (z - blockmean(z)).
    """
    mean = images.up(images.down(z))
    return (1 - gamma) ** 0.5 * (z - mean) + max(1 + 3 * gamma, 0.0) ** 0.5 * mean


def class_conditions(labels: Array, num_classes: int) -> tuple[Condition, Condition]:
    """(condition, null condition) of a class model; the null class is `num_classes`."""
    return {"labels": labels}, {"labels": jnp.full_like(labels, num_classes)}
