"""Distillation: a student that predicts average velocities, for one or a few evaluations per stage.

The student u(x, tau, rho) predicts the average velocity over [tau, rho] within a stage's window:
x_rho = x_tau + (rho - tau) u. At rho = tau it is the velocity, so that the teacher is an exact start.
Intervals have dyadic lengths h. An interval's average is the mean of those of its halves, the second
one beginning where the first one ends: these come from the student's own average (EMA), except on the
lowest rung, where a midpoint step of the frozen, guided teacher spans the whole interval.

Source: interval splitting as in SplitMeanFlow (arXiv 2507.16884) and shortcut models (2410.12557), here
with a teacher as the bottom rung and within each stage of a cascade.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from pixelflow_jax.cascade.packing import PackLayout
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.config import build_cascade
from pixelflow_jax.models.conditioning import Condition, encode_text
from pixelflow_jax.models.flops import forward_flops
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.sampling.guidance import Guidance
from pixelflow_jax.training.objective import FlowBatch, Tokens

# Lengths of intervals, in thousandths of a stage. A stage's images take a length from TAUGHT and one
# from SPLIT in turn; each list is used cyclically.
TAUGHT = (125, 0)  # by the teacher
SPLIT = (1000, 500, 1000, 250)  # by the student's average
KINDS = 2


def interval_lengths(num_stages: int, index: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Return the length of the interval of the images with these places in the global batch."""
    place = index // num_stages
    turn = place // KINDS
    taught, split = (jnp.asarray(x, jnp.float32)[turn % len(x)] for x in (TAUGHT, SPLIT))
    return jnp.where(place % KINDS, split, taught)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What the targets are made with.

    Attributes:
      cascade: the stages.
      student, teacher: the networks.
      weights: of the teacher's guidance in each stage, folded into the targets.
    """

    cascade: Cascade
    student: PixelFlow
    teacher: PixelFlow
    weights: tuple[float, ...]

    def retarget(
        self, batch: FlowBatch, layout: PackLayout, average: dict, teacher: dict, null: Condition
    ) -> FlowBatch:
        """Return a batch whose targets are average velocities.

        Args:
          batch, layout: from `objective.corrupt`, with the condition "interval" of `interval_lengths`.
          average, teacher: parameters of the student's average and of the teacher.
          null: the condition of the unconditional half, leaves [1, ...].
        """
        parts = [self._part(batch, layout, kind) for kind in range(KINDS)]
        targets = self._taught(*parts[0], teacher, null), self._split(*parts[1], average)
        target = [
            jnp.stack(pair, axis=2).reshape(x.shape)
            for x, *pair in zip(batch.tokens, *targets, strict=True)
        ]
        return jax.lax.stop_gradient(batch._replace(target=target))

    def target_flops(self, layout: PackLayout, context_length: int = 0) -> int:
        """Return the FLOPs of the targets of one row; the layout is that of the whole row."""
        half = _resized(layout, [1 / KINDS] * len(layout.groups))
        guided = _resized(half, [1 if w == 1 else 2 for w in self.weights])
        student, teacher = (self.student, half), (self.teacher, guided)
        return 2 * sum(forward_flops(*pair, context_length) for pair in (student, teacher))

    def _part(self, batch, layout, kind):
        """Return (tokens, T, condition, lengths, layout) of the images of one kind."""

        def mine(x):
            parts = layout.split_sequences(x)
            return jnp.concatenate([part[:, kind::KINDS] for part in parts], axis=1)

        tokens = [x[:, kind::KINDS] for x in batch.tokens]
        timesteps, condition = jax.tree.map(mine, (batch.timesteps, batch.condition))
        lengths = condition.pop("interval")
        return tokens, timesteps, condition, lengths, _resized(layout, [1 / KINDS] * len(layout.groups))

    def _taught(self, x, timesteps, condition, lengths, layout, params, null) -> Tokens:
        """Return the teacher's average velocity over each interval by a midpoint step."""
        condition, null = (encode_text(self.teacher, params, c) for c in (condition, null))
        velocity = self._guided(params, layout, condition, null)
        return [v[1] for v in self._halves(velocity, x, timesteps, lengths, layout)]

    def _split(self, x, timesteps, condition, lengths, layout, params) -> Tokens:
        """Return the mean of the student's average velocities over the halves of each interval."""
        condition = {**encode_text(self.student, params, condition), "interval": lengths / 2}

        def velocity(x, timesteps):
            return self.student.apply({"params": params}, x, timesteps, layout, **condition)

        return [v.mean(axis=0) for v in self._halves(velocity, x, timesteps, lengths, layout)]

    def _halves(self, velocity, x, timesteps, lengths, layout) -> Tokens:
        """Return the velocities [2, ...] at the start of each interval, and half of it later."""
        steps = [h[..., None, None] / 2000 for h in layout.split_sequences(lengths)]
        slopes = [self.cascade.timestep_line(s)[1] for s in range(self.cascade.num_stages)]
        slopes = np.repeat(slopes, [group.count for group in layout.groups])
        forth = jnp.asarray(slopes, timesteps.dtype) * lengths / 2000

        def step(point, _):
            x, timesteps = point
            found = velocity(x, timesteps)
            moved = [y + h * v for y, h, v in zip(x, steps, found, strict=True)]
            return (moved, timesteps + forth), found

        # A loop, so that the network is compiled once; as with its layers, slower on CPU unless unrolled
        unroll = min(2, self.student.scan_unroll)
        return jax.lax.scan(step, (x, timesteps), length=2, unroll=unroll)[1]

    def _guided(self, params, layout, condition, null):
        """Return the guided velocity of the teacher as a function of (tokens, T)."""
        weights = self.weights
        doubled = _resized(layout, [1 if w == 1 else 2 for w in weights])

        def double(parts, others):
            """Join the unconditional half, from `others`, and the conditional one."""
            triples = zip(parts, others, weights, strict=True)
            return [x if w == 1 else jnp.concatenate([y, x], axis=1) for x, y, w in triples]

        def joined(x, other):
            parts = layout.split_sequences(x)
            return jnp.concatenate(double(parts, layout.split_sequences(other)), axis=1)

        null = jax.tree.map(lambda x, y: jnp.broadcast_to(y[None], x.shape), condition, null)
        condition = jax.tree.map(joined, condition, null)

        def velocity(x, timesteps):
            both = double(x, x), joined(timesteps, timesteps)
            out = self.teacher.apply({"params": params}, *both, doubled, **condition)
            return [v if w == 1 else _extrapolate(v, w) for v, w in zip(out, weights, strict=True)]

        return velocity


def build_distillation(config: ConfigDict, student: PixelFlow) -> Distillation:
    """Return how a run makes the targets of its student."""
    cascade, distill = build_cascade(config), config.distill
    weights = Guidance(distill.guidance_scale, distill.guidance_schedule).weights(cascade.num_stages)
    return Distillation(cascade, student, student.clone(intervals=False), weights)


def _resized(layout: PackLayout, factors: Sequence[float]) -> PackLayout:
    """Return a layout with as many times the sequences in each group."""
    pairs = zip(layout.groups, factors, strict=True)
    groups = [dataclasses.replace(group, count=int(group.count * factor)) for group, factor in pairs]
    return dataclasses.replace(layout, groups=tuple(groups))


def _extrapolate(v: Float[Array, "rows twice length d"], weight: float):
    without, with_condition = jnp.split(v, 2, axis=1)
    return without + weight * (with_condition - without)
