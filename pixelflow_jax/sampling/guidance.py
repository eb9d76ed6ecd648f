"""Classifier-free guidance as a schedule over stages and time."""

import dataclasses

import numpy as np

from pixelflow_jax.common import UserError
from pixelflow_jax.common.config_keys import BOUNDS, CHOICES, check

# Share of (scale - 1) in each of the four stages of the released class model.
REFERENCE_SHARES = (0.0, 1 / 6, 2 / 3, 1.0)
SCHEDULES = CHOICES["sample.guidance_schedule"]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Weights that extrapolate the velocity from unconditional to conditional.

    v = v_uncond + w_s (v_cond - v_uncond), with w_s = 1 + (scale - 1) * share_s. Where w_s is exactly 1,
    the unconditional half is skipped.

    Attributes:
      scale: w of the last stage; 0 or less disables guidance (w = 1 everywhere).
      schedule: "constant" (share 1), "stagewise" (the released table interpolated over s/(S-1), so that
        it ends at the full weight for any S), or "reference" (the first S entries of the table).
      interval: (low, high) on the cascade's time axis T/1000, from noise to data; outside it w = 1.

    Raises:
      UserError: for an unknown schedule, an empty interval, or "reference" with more than 4 stages.
    """

    scale: float = 2.4
    schedule: str = "stagewise"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        check("the guidance schedule", self.schedule, choices=SCHEDULES)
        check("guidance_scale", self.scale, BOUNDS["sample.guidance_scale"])
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise UserError(f"the guidance interval must be 0 <= low < high <= 1, got {self.interval}")

    def weights(self, num_stages: int) -> tuple[float, ...]:
        """Return w_s inside the interval for every stage."""
        if self.scale <= 0:
            return (1.0,) * num_stages
        return tuple(1 + (self.scale - 1) * share for share in self._shares(num_stages))

    def active(self, timestep) -> np.ndarray:
        """Return whether guidance is active at the network's time T (an array or a number)."""
        low, high = self.interval
        return (timestep >= 1000 * low) & (timestep <= 1000 * high)

    def _shares(self, num_stages: int) -> tuple[float, ...]:
        if self.schedule == "constant":
            return (1.0,) * num_stages
        if self.schedule == "reference":
            if num_stages > len(REFERENCE_SHARES):
                raise UserError(
                    f"the reference guidance table knows 4 stages, this model has {num_stages}; use "
                    f"the stagewise schedule"
                )
            return REFERENCE_SHARES[:num_stages]
        if num_stages == 1:
            return (1.0,)
        places = np.linspace(0, len(REFERENCE_SHARES) - 1, num_stages)
        return tuple(np.interp(places, range(len(REFERENCE_SHARES)), REFERENCE_SHARES).tolist())
