"""From noise to images, stage by stage: the whole cascade in one function that compiles once.

Source: PixelFlow (arXiv 2504.07963), section 3.3. Within a stage, an ODE solver follows the velocity
from tau 0 to 1. Between stages, x <- alpha * Up(x) + beta * n, where n is noise correlated within each
2x2 block such that mean and variance match the window of the next stage.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.packing import PackLayout, cascade_layout
from pixelflow_jax.cascade.renoising import correlate_blocks, step_up
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError, numerics
from pixelflow_jax.common.config_keys import BOUNDS, check
from pixelflow_jax.models.conditioning import Condition
from pixelflow_jax.models.flops import forward_flops
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.sampling.grids import StageGrid, TimeGrid
from pixelflow_jax.sampling.guidance import Guidance
from pixelflow_jax.sampling.inpainting import Given, GivenAtStage, at_stage
from pixelflow_jax.sampling.solvers import Field, evaluations_per_step, resolve_control, solve_fixed

STUDENT_STEPS = (1, 2, 4, 8)  # per stage, of a distilled model (training/distillation.py)
MAX_TOKENS = 1 << 17  # per call of the network: enough to fill a chip, few enough to fit
CPU_TOKENS = 1 << 11  # the same on a CPU: few enough for its caches


class Noise(NamedTuple):
    """All randomness of a sample: the start, and one block noise for each step up a stage.

    `given` holds what is kept of given images, for inpainting.
    """

    start: Float[Array, "b h w c"]
    blocks: list[Float[Array, "b hs ws c"]]
    given: Given | None = None


class Trajectory(NamedTuple):
    """A sampling run.

    Attributes:
      ends: the image at the end of every stage that was run, approximately in [-1, 1]; the last one is
        the sample.
      nfe: network evaluations per image and stage; a conditional and unconditional pair counts as one.
    """

    ends: list[Float[Array, "b hs ws c"]]
    nfe: Int[Array, "b stages"]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The settings of a sampling run; call `run` or `sample` under jit.

    Attributes:
      model, cascade: the network and its stages.
      height, width: size of the final image, in pixels.
      grid, guidance, solver: see grids.py, guidance.py, solvers.py.
      step_control: "fixed" uses the grid's steps; "per_image" and "per_batch" choose steps by the
        solver's error estimate for each image or the whole batch; "auto": see `resolve_control`.
      rtol, atol: tolerances of the error control.
      shards: devices along the mesh axis `context` that share each image's tokens; all hold the image.
      resample: how often each step is repeated where a part of the image is given (inpainting.py).

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
    step_control: str = "auto"
    shards: int = 1
    resample: int = 0

    def __post_init__(self):
        self.cascade.check_size(self.height, self.width, self.model.patch_size)
        resolve_control(self.solver, self.step_control)
        for name in ("rtol", "atol"):
            check(name, getattr(self, name), BOUNDS[f"sample.{name}"])
        for stage in range(self.cascade.num_stages):
            tokens = self.layout(stage, 1).row_length
            if tokens % self.shards:
                raise UserError(f"{self.shards} devices cannot share {tokens} tokens (stage {stage})")
        self.grid.steps(self.cascade.num_stages)
        weights = self.guidance.weights(self.cascade.num_stages)
        if self.model.intervals:
            self._check_student(weights)

    def _check_student(self, weights) -> None:
        """Raise UserError for what no step of distillation has seen."""
        grid, steps = self.grid, self.grid.steps(self.cascade.num_stages)
        few, asked = ", ".join(map(str, STUDENT_STEPS)), ",".join(map(str, steps))
        wrong = {
            f"num_steps {few} per stage, not {asked}": {*steps} - {*STUDENT_STEPS},
            f"solver euler, not {self.solver}": self.solver != "euler",
            f"grid uniform, not {grid.kind}": grid.kind != "uniform",
            f"shift 1, not {grid.shift}": grid.shift != 1,
            f"guidance_scale 0 (its own is built in), not {self.guidance.scale}": {*weights} - {1.0},
        }
        if any(wrong.values()):
            said = "; ".join(line for line, is_wrong in wrong.items() if is_wrong)
            raise UserError(f"a distilled model (config.distill.teacher) takes {said}")

    @property
    def control(self) -> str:
        """What determines the steps: "fixed", "per_image" or "per_batch"."""
        return resolve_control(self.solver, self.step_control)

    def stage_size(self, stage: int) -> tuple[int, int, int]:
        """Return (height, width, 3) of a stage's images."""
        return *self.cascade.size(stage, self.height, self.width), 3

    def layout(self, stage: int, count: int) -> PackLayout:
        """Return the layout of a row of `count` images at a stage."""
        size, patch_size = (self.height, self.width), self.model.patch_size
        return cascade_layout(self.cascade, {stage: count}, *size, patch_size, self.shards)

    def stage_flops(self, context_length: int = 0) -> Float[np.ndarray, " stages"]:
        """Return the FLOPs of one evaluation of each stage for one image, guidance included.

        `context_length` is the texts' length in tokens, for models with text.
        """
        one_device = dataclasses.replace(self, shards=1)
        weights = self.guidance.weights(self.cascade.num_stages)
        layouts = [one_device.layout(stage, 1 if w == 1 else 2) for stage, w in enumerate(weights)]
        return np.array([forward_flops(self.model, x, context_length) for x in layouts], float)

    @numerics.pinned()
    def draw_noise(self, keys: Key[Array, " b"]) -> Noise:
        """Draw noise for each image from its own key, so that it does not depend on the batch."""

        def normal(stage):
            size = self.stage_size(stage)
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stage), size))(keys)

        later = range(1, self.cascade.num_stages)
        return Noise(normal(0), [correlate_blocks(normal(s), self.cascade.gamma) for s in later])

    def sample(
        self, params: dict, noise: Noise, condition: Condition, null_condition: Condition
    ) -> list[Float[Array, "b hs ws c"]]:
        """Return the image at the end of every stage: the `ends` of `run`."""
        return self.run(params, noise, condition, null_condition).ends

    def run(
        self,
        params: dict,
        noise: Noise,
        condition: Condition,
        null_condition: Condition,
        first_stage: int = 0,
        first_tau: float = 0.0,
    ) -> Trajectory:
        """Sample from noise, or from any point in the cascade (see starts.py).

        Args:
          params: the model's parameters.
          noise: from `draw_noise`; `start` is x at (first_stage, first_tau).
          condition, null_condition: {"labels": int [B]}, or {"context": [B, t, c],
            "context_mask": bool [B, t]}; the second one is for the unconditional half.
          first_stage, first_tau: the point to start from.
        """
        x, ends, nfe = noise.start, [], []
        for stage in range(first_stage, self.cascade.num_stages):
            point = stage, first_stage, first_tau
            x, count = self.run_stage(params, x, noise, condition, null_condition, *point)
            ends.append(x)
            nfe.append(count)
        return Trajectory(ends, jnp.stack(nfe, axis=1))

    def run_stage(
        self,
        params: dict,
        x: Float[Array, "b h w c"],
        noise: Noise,
        condition: Condition,
        null_condition: Condition,
        stage: int,
        first_stage: int = 0,
        first_tau: float = 0.0,
    ) -> tuple[Float[Array, "b h2 w2 c"], Int[Array, " b"]]:
        """Return (x at the end of `stage`, evaluations); x is the end of the stage before.

        At `first_stage`, it is x at `first_tau`. The other arguments are those of `run`.
        """
        if stage > first_stage:
            x = self.step_up(stage, x, noise.blocks[stage - 1])
        grid, given = self.stage_grid(stage), None
        if noise.given is not None:
            given = at_stage(noise.given, self.cascade, noise.blocks, first_stage, stage)
        grid = grid.after(first_tau if stage == first_stage else 0.0)
        return self.solve_stage(params, x, grid, condition, null_condition, given)

    def stage_grid(self, stage: int) -> StageGrid:
        """Return the grid of one stage; error-controlled steps use only its ends and times."""
        return self.grid.stage(self.cascade, stage, self.control != "fixed")

    def step_up(self, stage: int, x: Float[Array, "b h w c"], block: Float[Array, "b h2 w2 c"]):
        """Return the start of `stage` from the end of the previous stage: enlarge, add block noise."""
        return step_up(self.cascade, stage, x, block)

    def solve_stage(
        self,
        params: dict,
        x: Float[Array, "b h w c"],
        grid: StageGrid,
        condition: Condition,
        null_condition: Condition,
        given: GivenAtStage | None = None,
    ) -> tuple[Float[Array, "b h w c"], Int[Array, " b"]]:
        """Return (x at the end of `grid`, evaluations); a backwards grid inverts the stage.

        Pixels that are `given` stay on their path, with fixed steps only.
        """
        weight = self.guidance.weights(self.cascade.num_stages)[grid.stage]
        nfe = jnp.zeros(len(x), jnp.int32)
        for number, (part, guided) in enumerate(self._parts(grid, weight)):
            args = (params, part, weight if guided else 1.0)
            if self.control == "fixed":
                field = self.field(*args, condition, null_condition)
                kept = (given.part(number), self.resample) if given else ()
                x = solve_fixed(self.solver, field, x, np.array(part.taus), *kept)
                count = (len(part.taus) - 1) * evaluations_per_step(self.solver)
                count *= 1 + (self.resample if given else 0)
            elif self.control == "per_image":
                # In groups, because under vmap the network sees all images at once
                each = jax.vmap(functools.partial(self._adapt_one, *args))
                x, count = self._by_groups(each, 1 + guided, x, condition, null_condition)
            else:
                x, count = self._adapt(self.field(*args, condition, null_condition), x, part)
            nfe += count
        return x, nfe

    def _adapt(self, field: Callable, x, grid: StageGrid):
        from pixelflow_jax.sampling.adaptive import solve_adaptive

        span = (grid.taus[0], grid.taus[-1])
        return solve_adaptive(self.solver, field, x, self.rtol, self.atol, span)

    def _adapt_one(self, params, grid: StageGrid, weight: float, x, condition, null_condition):
        """Solve one image with its own error control: its steps do not depend on its batch."""
        batch_of_one = jax.tree.map(lambda leaf: leaf[None], (condition, null_condition))
        field = self.field(params, grid, weight, *batch_of_one)
        return self._adapt(lambda x, tau: field(x[None], tau)[0], x, grid)

    def _parts(self, grid: StageGrid, weight: float) -> list[tuple[StageGrid, bool]]:
        """Split a grid where guidance is switched on or off; return (part, whether guided).

        Fixed steps are not divided: the midpoint of a step decides for the whole step. The solver
        restarts in each part, so that no step contains the jump.
        """
        if weight == 1 or self.guidance.interval == (0, 1):
            return [(grid, weight != 1)]
        taus = np.array(grid.taus)
        if self.control != "fixed":
            taus = grid.cut(1000 * np.array(self.guidance.interval))
        on = self.guidance.active(grid.timestep((taus[:-1] + taus[1:]) / 2))
        cuts = [0, *(np.flatnonzero(np.diff(on)) + 1).tolist(), len(on)]
        return [
            (dataclasses.replace(grid, taus=tuple(taus[begin : end + 1].tolist())), bool(on[begin]))
            for begin, end in zip(cuts[:-1], cuts[1:], strict=True)
        ]

    def _by_groups(self, function: Callable, halves: int, x: Float[Array, "b h w c"], *rest):
        """Apply `function` to a batch in groups of at most MAX_TOKENS, or CPU_TOKENS on a CPU.

        A group holds at least one image. The groups are equal, so that there is only one program; the
        last one repeats the first images.
        """
        row = halves * x.shape[1] * x.shape[2] // self.model.base_patch**2 // self.shards
        most = CPU_TOKENS if self.model.target == "cpu" else MAX_TOKENS
        number = -(-len(x) // max(most // row, 1))
        if number == 1:
            return function(x, *rest)
        size = -(-len(x) // number)
        padded = np.arange(number * size) % len(x)
        groups = jax.tree.map(lambda y: y[padded].reshape(number, size, *y.shape[1:]), (x, *rest))
        out = jax.lax.map(lambda group: function(*group), groups)
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[: len(x)], out)

    def field(
        self, params, grid: StageGrid, weight: float, condition: Condition, null_condition: Condition
    ) -> Field:
        """Return the guided velocity as a function of (x [B, h, w, c], tau).

        A row holds one image, or its conditional and unconditional halves. The network processes a large
        batch in groups; see `_by_groups`.
        """
        both = weight != 1
        pair = (null_condition, condition) if both else (condition,)
        inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *pair)

        def network(tau, x, inputs):
            batch, height, width, _ = x.shape
            layout = self.layout(grid.stage, len(pair))
            p = layout.groups[0].patch_size
            tokens = jnp.stack([images.patchify(x, p)] * len(pair), axis=1)
            timesteps = jnp.full((batch, len(pair)), grid.timestep(tau), x.dtype)
            if self.model.intervals:
                inputs = {**inputs, "interval": jnp.full_like(timesteps, 1000 * grid.step)}
            (out,) = self.model.apply(
                {"params": params}, [layout.local(tokens)], timesteps, layout, **inputs
            )
            out = layout.whole(out.astype(x.dtype))
            first = out[:, 0]
            out = first + weight * (out[:, 1] - first) if both else first
            return images.unpatchify(out, height, width, p)

        return lambda x, tau: self._by_groups(functools.partial(network, tau), len(pair), x, inputs)


def class_conditions(labels: Int[Array, " b"], num_classes: int) -> tuple[Condition, Condition]:
    """Return (condition, null condition) of a class model; the null class is `num_classes`."""
    return {"labels": labels}, {"labels": jnp.full_like(labels, num_classes)}
