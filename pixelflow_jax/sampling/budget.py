"""How many steps each stage gets out of a budget of evaluations, by measured error per cost.

On a few images: one tight solution of the whole cascade; from its start of each stage, 1, 2, 4, 8 and 16
steps of the solver; and, for each stage, one tight run from an end that is off, which tells how much of
an error there is left in the final image. So the error in the final image that n steps of stage s cause
is measured at five n, and a line through their logarithms gives the rest.

Then steps go, one by one, to the stage where the next one takes away the most squared error per FLOP,
until the evaluations are used up.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pixelflow_jax.common.errors import UserError
from pixelflow_jax.models.conditioning import Condition, encode_text
from pixelflow_jax.models.flops import forward_flops
from pixelflow_jax.sampling.grids import TimeGrid
from pixelflow_jax.sampling.sampler import Sampler
from pixelflow_jax.sampling.solvers import evaluations_per_step, solve_fixed
from pixelflow_jax.sampling.starts import image_keys

TRIED = (1, 2, 4, 8, 16)  # steps whose error is measured
TIGHT_STEPS = 16  # of dopri5: the truth


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a sampler's stages cost and how wrong they are.

    errors: [stages, tries] root-mean-square error in the final image, by stage and steps (TRIED).
    flops: of one evaluation of each stage, for one image, both halves where guided.
    """

    errors: Float[np.ndarray, "s t"]
    flops: Float[np.ndarray, " s"]

    def error(self, stage: int, steps: int) -> float:
        """The error that `steps` in `stage` cause, between and beyond those that were tried."""
        x, y = np.log(TRIED), np.log(self.errors[stage])
        place = min(max(int(np.searchsorted(TRIED, steps, "right")) - 1, 0), len(TRIED) - 2)
        slope = (y[place + 1] - y[place]) / (x[place + 1] - x[place])
        return float(np.exp(y[place] + slope * (np.log(steps) - x[place])))


def measure(
    sampler: Sampler, params: dict, condition: Condition, null_condition: Condition, seed: int = 0
) -> Measured:
    """Measures the stages of a sampler with fixed steps, on as many images as there are conditions."""
    stages = sampler.cascade.num_stages
    count = len(jax.tree.leaves(condition)[0])
    noise = sampler.draw_noise(image_keys(seed, jnp.arange(count)))
    conditions = [encode_text(sampler.model, params, c) for c in (condition, null_condition)]
    run = functools.partial(_run_stage, sampler, params, conditions)

    starts, ends, x = [], [], noise.start
    for stage in range(stages):
        if stage:
            x = sampler.step_up(stage, x, noise.blocks[stage - 1])
        starts.append(x)
        x = run(stage, x, 0)
        ends.append(x)

    def final(stage, x):  # from the end of a stage to the image, tightly
        for later in range(stage + 1, stages):
            x = run(later, sampler.step_up(later, x, noise.blocks[later - 1]), 0)
        return x

    errors = np.empty((stages, len(TRIED)))
    for stage in range(stages):
        off = [run(stage, starts[stage], steps) for steps in TRIED]
        local = np.array([rms(x - ends[stage]) for x in off])
        typical = len(TRIED) // 2
        kept = rms(final(stage, off[typical]) - ends[-1]) / max(local[typical], 1e-12)
        errors[stage] = np.minimum.accumulate(np.maximum(local * kept, 1e-12))
    text = next((x.shape[1] for name, x in condition.items() if name.endswith("mask")), 0)
    return Measured(errors, stage_flops(sampler, text))


def rms(x: Array) -> float:
    """Root of the mean square."""
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def _run_stage(sampler: Sampler, params, conditions, stage: int, x, steps: int):
    """One stage in `steps` of the solver, or tightly (0): one program a stage for all of them."""
    table = np.ones((len(TRIED), TRIED[-1] + 1))
    for row, count in zip(table, TRIED, strict=True):
        one = TimeGrid((count,), sampler.grid.kind, sampler.grid.shift)
        row[: count + 1] = one.stage(sampler.cascade, stage).taus
    taus = table[TRIED.index(steps)] if steps else np.linspace(0, 1, TRIED[-1] + 1)
    return _solve(sampler, stage)(params, conditions, x, taus, steps, 0 if steps else TIGHT_STEPS)


@functools.lru_cache(maxsize=64)
def _solve(sampler: Sampler, stage: int):
    weight = sampler.guidance.weights(sampler.cascade.num_stages)[stage]
    grid = sampler.grid.stage(sampler.cascade, stage)
    tight = np.linspace(0, 1, TIGHT_STEPS + 1)

    @jax.jit
    def solve(params, conditions, x, taus, steps, tight_steps):
        field = sampler.field(params, grid, weight, *conditions)
        x = solve_fixed(sampler.solver, field, x, taus, steps)
        return solve_fixed("dopri5", field, x, tight, tight_steps)

    return solve


def stage_flops(sampler: Sampler, context_length: int = 0) -> Float[np.ndarray, " s"]:
    """FLOPs of one evaluation of each stage for one image, guidance included.

    `context_length` is that of the texts, of which models without text see nothing.
    """
    cost = []
    for stage, weight in enumerate(sampler.guidance.weights(sampler.cascade.num_stages)):
        layout = sampler.layout(stage, 1 if weight == 1 else 2)
        whole = dataclasses.replace(layout, shards=1)
        cost.append(forward_flops(sampler.model, whole, context_length))
    return np.array(cost, float)


def split_budget(measured: Measured, budget: int, per_step: int) -> tuple[int, ...]:
    """Steps of each stage for `budget` evaluations in all, of solvers with `per_step` evaluations.

    Raises:
      UserError: if the budget is less than one step a stage.
    """
    stages = len(measured.flops)
    if budget < stages * per_step:
        raise UserError(
            f"--nfe_budget={budget} is less than one step in each of {stages} stages, "
            f"{stages * per_step} evaluations with this solver"
        )
    steps = np.ones(stages, int)
    while steps.sum() < budget // per_step:
        gains = [
            (measured.error(stage, count) ** 2 - measured.error(stage, count + 1) ** 2)
            / measured.flops[stage]
            for stage, count in enumerate(steps)
        ]
        steps[np.argmax(gains)] += 1
    return tuple(steps.tolist())


def plan_steps(
    sampler: Sampler, params: dict, budget: int, condition: Condition, null_condition: Condition
) -> tuple[int, ...]:
    """Steps of each stage for `budget` evaluations, guidance taken as on all the way.

    Raises:
      UserError: if the budget is too small, or the error chooses the steps.
    """
    if sampler.control != "fixed":
        raise UserError(
            f"an nfe_budget is for fixed steps; {sampler.solver} chooses its own: add "
            f"--step_control=fixed"
        )
    per_step = evaluations_per_step(sampler.solver)
    return split_budget(measure(sampler, params, condition, null_condition), budget, per_step)
