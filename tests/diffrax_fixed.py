"""Fixed steps by Diffrax: the check of `solvers.solve_fixed`, and its rival in benchmarks/solvers.py."""

from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pixelflow_jax.sampling.solvers import Field


class AB2(diffrax.AbstractSolver):
    """Two-step Adams-Bashforth for steps of any size; the first is an Euler step.

    Second order at one evaluation a step: x + h ((1 + r/2) f - (r/2) f_before), where r = h / h_before.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return jnp.zeros_like(y0), jnp.zeros_like(t0), jnp.asarray(True)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        before, size_before, first = solver_state
        size, slope = t1 - t0, terms.vf(t0, y0, args)
        ratio = jnp.where(first | made_jump, 0.0, size / jnp.where(first, 1.0, size_before))
        y1 = y0 + size * ((1 + ratio / 2) * slope - ratio / 2 * before)
        return (
            y1,
            None,
            dict(y0=y0, y1=y1),
            (slope, size, jnp.zeros_like(first)),
            diffrax.RESULTS.successful,
        )

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def solve_fixed_diffrax(
    name: str, field: Field, x: Float[Array, "..."], taus: Float[np.ndarray, " n"]
) -> Float[Array, "..."]:
    """What `solvers.solve_fixed` computes, by Diffrax: the check of the fast path, and its rival."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda tau, y, args: field(y, jnp.asarray(tau, y.dtype))),
        AB2() if name == "ab2" else getattr(diffrax, name.capitalize())(),
        t0=taus[0],
        t1=taus[-1],
        dt0=None,
        y0=x,
        stepsize_controller=diffrax.StepTo(jnp.asarray(taus, x.dtype)),
        max_steps=len(taus),
    )
    return jax.tree.leaves(solution.ys)[0][-1]
