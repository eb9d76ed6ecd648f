"""The cascade of stages: time windows, the network's time axis, coefficients of the step between stages.

Plain numbers (numpy float64), no JAX arrays. Source: PixelFlow (arXiv 2504.07963), section 3. Rounding
follows the released code, because the released weights were trained with it.

Time runs from noise (0) to data (1). Stage 0 is the coarsest; each stage doubles height and width.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from pixelflow_jax.common import UserError

NUM_TRAIN_TIMES = 1000  # training draws tau from {0, 1, ..., 999} / 1000


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Stages, their time windows and the noise added between them. Raises UserError for bad values.

    Attributes:
      num_stages: S, at least 1. For images of size R, stage s works at R / 2^(S-1-s).
      gamma: covariance of the noise within a 2x2 block in the step to the next stage, in [-1/3, 0). At
        -1/3, the default, the noise of a block sums to zero.
    """

    num_stages: int = 4
    gamma: float = -1 / 3

    def __post_init__(self):
        if not 1 <= self.num_stages <= NUM_TRAIN_TIMES:
            raise UserError(f"cascade.num_stages must be at least 1, got {self.num_stages}")
        if not -1 / 3 <= self.gamma < 0:
            raise UserError(f"cascade.gamma must lie in [-1/3, 0), got {self.gamma}")

    @functools.cached_property
    def original_start(self) -> tuple[float, ...]:
        """o[s]: the end of stage s - 1, where stage s would start if upsampling kept the noise white."""
        return tuple(self._cut(s) for s in range(self.num_stages))

    @functools.cached_property
    def start(self) -> tuple[float, ...]:
        """The start of each stage's window: o[s], moved back so that renoising matches the variance."""
        return tuple(o * self._rectify(o) if s else o for s, o in enumerate(self.original_start))

    @functools.cached_property
    def end(self) -> tuple[float, ...]:
        """The end of each stage's window; the last is exactly 1."""
        return (*(self._cut(s + 1) for s in range(self.num_stages - 1)), 1.0)

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """The time T in [0, 999] that the network sees at tau = i/1000: [S, 1000] float64.

        All stages share one axis; the share of each is proportional to the length of its window.
        """
        lengths = [end - start for start, end in zip(self.start, self.end, strict=True)]
        total = sum(lengths)
        cuts = [int(NUM_TRAIN_TIMES * (sum(lengths[:s]) / total)) for s in range(self.num_stages)]
        tables = [
            np.linspace(low, high, NUM_TRAIN_TIMES, endpoint=False)
            for low, high in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        last = np.linspace(cuts[-1], NUM_TRAIN_TIMES - 1, NUM_TRAIN_TIMES)
        return np.stack([*tables, last])

    def timestep_line(self, stage: int) -> tuple[float, float]:
        """Return (T at tau = 0, dT/dtau) of the line through a stage's training points."""
        table = self.timesteps[stage]
        return float(table[0]), float((table[-1] - table[0]) / (1 - 1 / NUM_TRAIN_TIMES))

    def renoising(self, stage: int) -> tuple[float, float]:
        """Return (alpha, beta) of the step to `stage` >= 1: x <- alpha * Up(x) + beta * block noise."""
        o = self.original_start[stage]
        alpha = self._rectify(o)
        return alpha, alpha * (1 - o) / math.sqrt(-self.gamma)

    def size(self, stage: int, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of `stage`, where the last stage has `height` x `width` pixels."""
        factor = 2 ** (self.num_stages - 1 - stage)
        return height // factor, width // factor

    def patches(self, patch_size: int | Sequence[int]) -> tuple[int, ...]:
        """Return the patch size of each stage, from one for all stages or one per stage.

        Raises UserError if their number is wrong, or one is not a multiple of the smallest.
        """
        if isinstance(patch_size, int):
            return (patch_size,) * self.num_stages
        sizes = tuple(patch_size)
        if len(sizes) != self.num_stages:
            raise UserError(
                f"patch_size {sizes} must be one number, or {self.num_stages}: one per stage"
            )
        if min(sizes) < 1 or any(size % min(sizes) for size in sizes):
            raise UserError(f"patch_size {sizes}: every size must be a multiple of the smallest")
        return sizes

    def unit(self, patch_size: int | Sequence[int]) -> int:
        """Return the number of pixels that an image's height and width must be multiples of."""
        last = self.num_stages - 1
        return max(p * 2 ** (last - stage) for stage, p in enumerate(self.patches(patch_size)))

    def check_size(self, height: int, width: int, patch_size: int | Sequence[int]) -> None:
        """Raise UserError unless the image of every stage is a whole number of patches."""
        unit = self.unit(patch_size)
        for name, value in (("height", height), ("width", width)):
            if value < unit or value % unit:
                below, above = max(value // unit, 1) * unit, (max(value, 0) // unit + 1) * unit
                choices = f"{below}" if below == above else f"{below} or {above}"
                raise UserError(
                    f"{name} {value} must be a positive multiple of {unit} (patch_size {patch_size}"
                    f" x 2^{self.num_stages - 1} for {self.num_stages} stages); try {choices}"
                )

    def _cut(self, stage: int) -> float:
        index = int(NUM_TRAIN_TIMES * (stage / self.num_stages))
        return float(np.float32(index) / np.float32(NUM_TRAIN_TIMES))

    def _rectify(self, o: float) -> float:
        return 1 / (math.sqrt(1 - 1 / self.gamma) * (1 - o) + o)
