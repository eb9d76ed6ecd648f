"""Error-controlled solvers, by Diffrax.

Import this module late: importing Diffrax and Equinox takes a second.
"""

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pixelflow_jax.common import numerics
from pixelflow_jax.sampling.solvers import Field

MAX_STEPS, MIN_STEP = 10_000, 1e-7  # of a stage, over which tau runs from 0 to 1
HUGE = 1e10  # replaces a velocity that is not finite; moves x beyond the range of images


class CountedSteps(diffrax.AbstractStepSizeController):
    """PIDController with a first step by `first_step`, rounded sizes, and a count of the first attempts.

    Sizes are rounded down to powers of 2^(1/4). Otherwise the last bits of the error estimate, which
    depend on batch and device, would change every later step slightly, and the image by its tolerance.

    Diffrax does not count the attempts up to the first accepted step. They matter because solvers that
    end a step with the first evaluation of the next one (FSAL) save one evaluation in each later
    attempt.
    """

    controller: diffrax.PIDController

    def wrap(self, direction):
        return CountedSteps(self.controller.wrap(direction))

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        tolerances = self.controller.rtol, self.controller.atol
        dt0 = first_step(lambda t, y: func(terms, t, y, args), y0, *tolerances, (t0, t1), error_order)
        first_end, state = self.controller.init(
            terms, t0, t1, y0, _rounded(dt0), args, func, error_order
        )
        return first_end, (state, jnp.asarray(0), jnp.asarray(False))

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, controller_state):
        state, attempts, accepted = controller_state
        keep, begin, end, jump, state, result = self.controller.adapt_step_size(
            t0, t1, y0, y1, args, y_error, error_order, state
        )
        end = begin + _rounded(end - begin)
        counts = (attempts + jnp.where(accepted, 0, 1), accepted | keep)
        return keep, begin, end, jump, (state, *counts), result


def _rounded(size):
    """Return the next lower power of 2^(1/4), or the nearest if it is almost equal."""
    return jnp.exp2(jnp.floor(4 * jnp.log2(size) + 0.01) / 4)


def first_step(field, x, rtol: float, atol: float, span, order: int):
    """Return a first step size for this tolerance, from two evaluations of field(tau, x).

    `span` runs forwards. Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I,
    section II.4. Diffrax implements it too, but does not use it in all versions.
    """
    scale = atol + rtol * jnp.abs(x)

    def norm(y):
        return jnp.sqrt(jnp.mean(jnp.square(y / scale)))

    slope = field(span[0], x)
    size, speed = norm(x), norm(slope)
    tiny = (size < 1e-5) | (speed < 1e-5)
    guess = jnp.where(tiny, 1e-6, 0.01 * size / jnp.where(tiny, 1.0, speed))
    bend = norm(field(span[0] + guess, x + guess * slope) - slope) / guess
    steepest = jnp.maximum(speed, bend)
    flat = steepest <= 1e-15
    by_bend = (0.01 / jnp.where(flat, 1.0, steepest)) ** (1 / (order + 1))
    by_bend = jnp.where(flat, jnp.maximum(1e-6, guess * 1e-3), by_bend)
    return jnp.clip(jnp.minimum(100 * guess, by_bend), 10 * MIN_STEP, span[1] - span[0])


def solve_adaptive(
    name: str,
    field: Field,
    x: Float[Array, "..."],
    rtol: float,
    atol: float,
    span: tuple[float, float] = (0.0, 1.0),
) -> tuple[Float[Array, "..."], Int[Array, ""]]:
    """Integrate from tau span[0] to span[1] with one error control for all of x.

    For one error control per image, vmap this function; each image then counts its own evaluations.

    Returns:
      (x at the end, evaluations). Evaluations include those for the first step size and those of
      rejected steps. x is NaN if the tolerance is not reached in MAX_STEPS or with MIN_STEP, or if the
      field is not finite: Diffrax's own error is a callback into Python, which a program for another
      machine cannot contain.
    """

    def finite_field(tau, y, args):
        velocity = field(y, jnp.asarray(tau, y.dtype))  # with NaN, step control would never end
        return jnp.where(jnp.isfinite(velocity), velocity, HUGE)

    solver = getattr(diffrax, name.capitalize())()
    x = jnp.where(jnp.isfinite(x), x, HUGE)  # the previous stage may have failed
    control = CountedSteps(diffrax.PIDController(rtol=rtol, atol=atol, dtmin=MIN_STEP))
    with numerics.precision(x.dtype):  # Diffrax sums slopes by matrix products
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(finite_field),
            solver,
            t0=span[0],
            t1=span[1],
            dt0=None,
            y0=x,
            stepsize_controller=control,
            saveat=diffrax.SaveAt(t1=True, controller_state=True),
            max_steps=MAX_STEPS,
            throw=False,
        )
    small = (jnp.abs(solution.ys[-1]) < HUGE * 1e-6).all()
    reached = (solution.result == diffrax.RESULTS.successful) & small
    first_attempts, attempts = solution.controller_state[1], solution.stats["num_steps"]
    a_step = len(solver.tableau.c) + 1
    later = a_step - 1 if solver.tableau.fsal else a_step
    evaluations = 2 + a_step * first_attempts + later * (attempts - first_attempts)  # 2: `first_step`
    return jnp.where(reached, solution.ys[-1], jnp.nan), evaluations
