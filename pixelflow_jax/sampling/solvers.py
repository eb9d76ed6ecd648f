"""ODE solvers over tau in [0, 1]: fixed steps by `lax.scan`, adaptive ones by Diffrax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pixelflow_jax.errors import UserError
from pixelflow_jax.sampling.grids import StageGrid, step_arrays

# (x, tau, a number) -> dx/dtau, of x's shape
Field = Callable[[Float[Array, "..."], Float[Array, ""]], Float[Array, "..."]]


def euler_step(field: Field, x, tau, size):
    """First order, one evaluation."""
    return x + size * field(x, tau)


def heun_step(field: Field, x, tau, size):
    """Second order (explicit trapezoid), two evaluations."""
    first = field(x, tau)
    second = field(x + size * first, tau + size)
    return x + size * (first + second) / 2


FIXED_STEP = {"euler": euler_step, "heun": heun_step}
ADAPTIVE = ("dopri5",)
MAX_STEPS, MIN_STEP = 10_000, 1e-7  # of an adaptive solver, a stage, whose tau runs from 0 to 1
HUGE = 1e10  # in place of a velocity that is not finite; it carries x where no image ever is
SOLVERS = (*FIXED_STEP, *ADAPTIVE)


def check_solver(name: str) -> None:
    """Raises UserError for a name that is not in SOLVERS."""
    if name not in SOLVERS:
        raise UserError(f"the solver must be one of {', '.join(SOLVERS)}, got {name!r}")


def solve_fixed(name: str, field: Field, x: Float[Array, "..."], grid: StageGrid):
    """Integrates over the steps of `grid`; returns x at its end."""
    step = FIXED_STEP[name]

    def body(x, times):
        return step(field, x, *times), None

    return jax.lax.scan(body, x, step_arrays(grid, x.dtype))[0]


def solve_adaptive(
    name: str, field: Field, x: Float[Array, "..."], rtol: float, atol: float
) -> Float[Array, "..."]:
    """Integrates from tau 0 to 1 with one error control for all of x; vmap it for one an image.

    NaN if the tolerance is not reached in MAX_STEPS or with MIN_STEP, or the field is not finite:
    Diffrax's own error would be a call back into Python, which a program for another machine cannot
    hold.
    """
    import diffrax  # imports Equinox; only who asks for it pays

    def finite_field(tau, y, args):
        velocity = field(y, jnp.asarray(tau, y.dtype))  # NaN would keep the step control busy for ever
        return jnp.where(jnp.isfinite(velocity), velocity, HUGE)

    solver = {"dopri5": diffrax.Dopri5}[name]()
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(finite_field),
        solver,
        t0=0.0,
        t1=1.0,
        dt0=None,
        y0=jnp.where(jnp.isfinite(x), x, HUGE),  # the stage before may have failed
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, dtmin=MIN_STEP),
        max_steps=MAX_STEPS,
        throw=False,
    )
    small = (jnp.abs(solution.ys[-1]) < HUGE * 1e-6).all()
    reached = (solution.result == diffrax.RESULTS.successful) & small
    return jnp.where(reached, solution.ys[-1], jnp.nan)
