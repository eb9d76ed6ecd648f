"""ODE solvers over tau in [0, 1] by name: fixed steps in one compiled loop, the fast path.

Explicit Runge-Kutta methods use their Butcher tableaus (Diffrax's, so that both paths use the same
method); AB2 uses its formula. Error-controlled steps are in adaptive.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pixelflow_jax.common import UserError
from pixelflow_jax.common.config_keys import CHOICES, check
from pixelflow_jax.sampling.inpainting import GivenAtStage

# (x, tau, a number) -> dx/dtau, of x's shape
Field = Callable[[Float[Array, "..."], Float[Array, ""]], Float[Array, "..."]]

# Order of convergence with fixed steps, by name
ORDERS = dict(euler=1, heun=2, midpoint=2, ralston=2, ab2=2, bosh3=3, dopri5=5, tsit5=5, dopri8=8)
SOLVERS = tuple(ORDERS)
WITHOUT_ERROR = ("euler", "ab2")  # without an error estimate: fixed steps only
CONTROLS = CHOICES["sample.step_control"]


def resolve_control(name: str, control: str = "auto") -> str:
    """Return what determines the steps: "fixed" (the grid), or the error "per_image" or "per_batch".

    "auto" means per_image for orders above 2, where error control pays off, and fixed otherwise. Raises
    UserError for an unknown control, or error control for a solver without an error estimate.
    """
    check("the solver", name, choices=SOLVERS)
    check("step_control", control, choices=CONTROLS)
    if control == "auto":
        return "per_image" if ORDERS[name] > 2 else "fixed"
    if control != "fixed" and name in WITHOUT_ERROR:
        raise UserError(f"{name} does not estimate its error: step_control must be fixed, not {control}")
    return control


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method without the evaluations that only estimate its error.

    Evaluation i is at tau + nodes[i] * size and x + size * sum_j weights[i][j] * slope[j].
    """

    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    solution: tuple[float, ...]


@functools.cache
def tableau(name: str) -> Tableau:
    """Return the tableau of a solver that has one (all but ab2)."""
    if name == "euler":
        return Tableau((0.0,), ((),), (1.0,))
    import diffrax  # imports Equinox, only when needed

    table = getattr(diffrax, name.capitalize()).tableau
    nodes = np.concatenate([[0.0], table.c])
    weights = [(), *(tuple(row.tolist()) for row in table.a_lower)]
    last = max(np.flatnonzero(table.b_sol)) + 1
    assert last >= len(nodes) - 2  # only the evaluation that ends the step is dropped
    return Tableau(
        tuple(nodes[:last].tolist()), tuple(weights[:last]), tuple(table.b_sol[:last].tolist())
    )


def evaluations_per_step(name: str) -> int:
    """Return the number of network evaluations per fixed step."""
    return 1 if name == "ab2" else len(tableau(name).nodes)


def _combine(x, size, weights, slopes):
    """Return x + size * sum of weights * slopes, skipping zeros."""
    terms = [w * slope for w, slope in zip(weights, slopes, strict=True) if w]
    return x + size * functools.reduce(jnp.add, terms) if terms else x


def runge_kutta_step(table: Tableau, field: Field, x, tau, size):
    """Run one step of an explicit Runge-Kutta method."""
    slopes: list[jax.Array] = []
    for node, weights in zip(table.nodes, table.weights, strict=True):
        slopes.append(field(_combine(x, size, weights, slopes), tau + node * size))
    return _combine(x, size, table.solution, slopes)


def solve_fixed(
    name: str,
    field: Field,
    x: Float[Array, "..."],
    taus: Float[np.ndarray, " n"],
    given: GivenAtStage | None = None,
    repeat: int = 0,
) -> Float[Array, "..."]:
    """Integrate over the steps from taus[i] to taus[i + 1]; return x at the last.

    AB2 (two-step Adams-Bashforth for steps of any size) starts with an Euler step, which keeps its
    second order and costs one evaluation, like every later step. The pixels that are `given` stay on
    their path; with them, every step may be repeated (inpainting.py).
    """
    sizes = taus[1:] - taus[:-1]
    # Constants indexed in the loop; a scan over them would slice and copy more
    starts, lengths = jnp.asarray(taus[:-1], x.dtype), jnp.asarray(sizes, x.dtype)

    before = None  # the slope at the start of the previous step
    if name == "ab2":
        ratios = jnp.asarray(np.concatenate([[0.0], sizes[1:] / sizes[:-1]]), x.dtype)

        def advance(i, x, before):
            slope, half = field(x, starts[i]), ratios[i] / 2
            return x + lengths[i] * ((1 + half) * slope - half * before), slope

        before = jnp.zeros_like(x)
    else:

        def advance(i, x, before):
            return runge_kutta_step(table, field, x, starts[i], lengths[i]), None

        table = tableau(name)

    def step(i, carry):
        x, before = carry
        if given is None:
            return advance(i, x, before)

        def again(number, x):
            x, _ = advance(i, given.put_back(x, starts[i]), before)
            end = starts[i] + lengths[i]
            return given.back(given.put_back(x, end), end, starts[i], i * repeat + number)

        x = jax.lax.fori_loop(0, repeat, again, x)
        return advance(i, given.put_back(x, starts[i]), before)

    x, _ = jax.lax.fori_loop(0, len(sizes), step, (x, before))
    return x if given is None else given.put_back(x, taus[-1])
