"""Time grids: the solver's steps in tau over each stage, and the network's time T at each tau."""

import dataclasses

import numpy as np
from jaxtyping import Array, Float

from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError
from pixelflow_jax.common.config_keys import BOUNDS, CHOICES, check

KINDS = CHOICES["sample.grid"]
SHORTEST_STEP = 1e-6  # a shorter remainder of a step is skipped


@dataclasses.dataclass(frozen=True)
class StageGrid:
    """One stage's grid.

    Attributes:
      stage: 0 is the coarsest.
      taus: the ends of the steps: num_steps + 1 numbers from 0 to 1.
      timestep_start, timestep_slope: the line T = start + slope * tau.
    """

    stage: int
    taus: tuple[float, ...]
    timestep_start: float
    timestep_slope: float

    def timestep(self, tau: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the network's time T at tau."""
        return self.timestep_start + self.timestep_slope * tau

    def after(self, tau: float) -> "StageGrid":
        """Return the part of the grid that starts at `tau`."""
        later = [t for t in self.taus if t > tau + SHORTEST_STEP]
        return dataclasses.replace(self, taus=(tau, *later))

    def cut(self, timesteps: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
        """Return the ends of the grid and, between them, the taus of these times T."""
        taus = (np.asarray(timesteps) - self.timestep_start) / self.timestep_slope
        first, last = self.taus[0], self.taus[-1]
        low, high = min(first, last) + SHORTEST_STEP, max(first, last) - SHORTEST_STEP
        inside = np.sort(taus[(taus > low) & (taus < high)])
        return np.array([first, *(inside if first < last else inside[::-1]), last])

    @property
    def step(self) -> float:
        """The length of the first step."""
        return self.taus[1] - self.taus[0]

    def backwards(self) -> "StageGrid":
        """Return the same steps in reverse order."""
        return dataclasses.replace(self, taus=self.taus[::-1])


@dataclasses.dataclass(frozen=True)
class TimeGrid:
    """The grids of all stages. Raises UserError for an unknown kind or a number that is not positive.

    Attributes:
      num_steps: steps of each stage, or one number for all of them. Adaptive solvers ignore it.
      kind: "uniform" splits [0, 1] into equal steps. "reference" is the released code's grid, for
        parity and the published results: num_steps - 1 equal steps up to 0.999 and a last one of 0.001,
        which costs an evaluation and has almost no effect.
      shift: warps t <- t / (shift + (1 - shift) t); above 1 puts more steps near the noise.
    """

    num_steps: tuple[int, ...] = (10,)
    kind: str = "uniform"
    shift: float = 1.0

    def __post_init__(self):
        check("the time grid", self.kind, choices=KINDS)
        check("the grid's shift", self.shift, BOUNDS["sample.shift"])
        if not self.num_steps or min(self.num_steps) < 1:
            steps = ",".join(map(str, self.num_steps))
            raise UserError(f"num_steps must be at least 1 in every stage, got {steps}")

    def steps(self, num_stages: int) -> tuple[int, ...]:
        """Return the steps of each stage. Raises UserError if their number is not that of the stages."""
        if len(self.num_steps) == 1:
            return self.num_steps * num_stages
        if len(self.num_steps) != num_stages:
            raise UserError(
                f"num_steps has {len(self.num_steps)} entries for {num_stages} stages; give one "
                f"number for all stages, or {num_stages} numbers"
            )
        return self.num_steps

    def stage(self, cascade: Cascade, stage: int, adaptive: bool = False) -> StageGrid:
        """Return the grid of one stage.

        For adaptive solvers, the reference kind draws the line for T over [0, 1] instead of [0, 0.999],
        as the released code does (0.1% off the line through the training points).
        """
        count, reference = self.steps(cascade.num_stages)[stage], self.kind == "reference"
        t = np.linspace(0, 0.999, count) if reference else np.linspace(0, 1, count + 1)
        t = t / (self.shift + (1 - self.shift) * t)
        t = np.append(t, 1.0) if reference else t
        start, slope = cascade.timestep_line(stage)
        if adaptive and reference:
            slope = float(cascade.timesteps[stage][-1] - start)
        return StageGrid(stage, tuple(t.tolist()), start, slope)
