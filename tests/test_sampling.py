"""Sampling: guidance, solvers, invariance to the batch, one compilation."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelflow_jax.cascade import Cascade
from pixelflow_jax.errors import UserError
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.sampling.generate import image_keys, make_generate
from pixelflow_jax.sampling.grids import StageGrid, TimeGrid
from pixelflow_jax.sampling.guidance import Guidance
from pixelflow_jax.sampling.sampler import Sampler, class_conditions
from pixelflow_jax.sampling.solvers import solve_adaptive, solve_fixed

MODEL = PixelFlow(2, 8, 2, 2, num_classes=10)


def make_sampler(**kwargs):
    kwargs = dict(grid=TimeGrid((3,)), height=16, width=16) | kwargs
    return Sampler(MODEL, Cascade(2), **kwargs)


def run(sampler, params, count=4, labels=None):
    labels = jnp.arange(count) % 10 if labels is None else labels
    noise = sampler.draw_noise(image_keys(0, jnp.arange(count)))
    return jax.jit(sampler.sample)(params, noise, *class_conditions(labels, 10))


def test_guidance_tables():
    """Catches a table that does not end at the full weight, and the official one altered."""
    assert Guidance(2.5, "reference").weights(4) == pytest.approx((1, 1.25, 2, 2.5))
    assert Guidance(2.5, "stagewise").weights(4) == pytest.approx((1, 1.25, 2, 2.5))
    assert Guidance(2.5, "reference").weights(2) == pytest.approx((1, 1.25))
    for num_stages in range(1, 9):
        weights = Guidance(3.0).weights(num_stages)
        assert weights[-1] == 3 and len(weights) == num_stages and list(weights) == sorted(weights)
    assert Guidance(0.0).weights(3) == Guidance(-1.0, "constant").weights(3) == (1, 1, 1)
    with pytest.raises(UserError, match="knows 4 stages"):
        Guidance(2.0, "reference").weights(5)


def test_guidance_is_the_formula_and_is_skipped_at_1(noisy_params):
    """Catches swapped halves, and an unconditional half that is paid for at w = 1."""
    params = noisy_params(MODEL)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    conditions = class_conditions(jnp.array([1, 2]), 10)
    grid = TimeGrid((1,)).stage(Cascade(2), 1)

    def velocity(weight, *pair):
        return make_sampler()._field(params, grid, weight, *pair)(x, jnp.float32(0.5))

    cond, uncond = velocity(1.0, *conditions), velocity(1.0, *conditions[::-1])
    guided = velocity(2.5, *conditions)
    np.testing.assert_allclose(guided, uncond + 2.5 * (cond - uncond), rtol=1e-4, atol=1e-5)

    def flops(scale):
        sampler = make_sampler(guidance=Guidance(scale, "constant"))
        arguments = (params, sampler.draw_noise(image_keys(0, jnp.arange(2))), *conditions)
        return jax.jit(sampler.sample).lower(*arguments).cost_analysis()["flops"]

    assert 1.8 < flops(2.0) / flops(1.0) < 2.2


def test_guidance_interval(noisy_params):
    """Catches an interval that guides everywhere or nowhere, for fixed steps and adaptive ones."""
    params = noisy_params(MODEL)

    def image(solver, **kwargs):
        guidance = Guidance(3.0, "constant", **kwargs)
        return run(make_sampler(guidance=guidance, solver=solver), params)[-1]

    for solver in ("euler", "dopri5"):
        whole, part = image(solver), image(solver, interval=(0.3, 0.8))
        plain = run(make_sampler(guidance=Guidance(1.0), solver=solver), params)[-1]
        assert np.abs(whole - part).max() > 1e-3 and np.abs(plain - part).max() > 1e-3
        np.testing.assert_allclose(image(solver, interval=(0.0, 1.0)), whole)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_a_neighbour_in_the_batch_changes_no_bit(noisy_params, solver):
    """Catches noise, or step sizes of an adaptive solver, shared by a batch."""
    params = noisy_params(MODEL)
    sampler = make_sampler(solver=solver)
    sample = jax.jit(sampler.sample)

    def first_image(neighbour):
        noise = sampler.draw_noise(image_keys(0, jnp.array([0, neighbour])))
        return sample(params, noise, *class_conditions(jnp.array([1, neighbour]), 10))[-1][0]

    np.testing.assert_array_equal(first_image(3), first_image(8))


def test_batch_sizes_agree(noisy_params):
    """Catches an image that depends on how many there are."""
    params = noisy_params(MODEL)
    large, small = (run(make_sampler(), params, count)[-1] for count in (5, 2))
    np.testing.assert_allclose(large[:2], small, atol=1e-5)


def test_one_compilation_a_shape(noisy_params):
    """Catches a sampler that retraces for new labels, keys or parameters."""
    params = noisy_params(MODEL)
    generate = make_generate(make_sampler())
    for seed in range(3):
        labels = jnp.full(4, seed)
        image, _ = generate(params, image_keys(seed, jnp.arange(4)), labels)
    assert generate._cache_size() == 1
    assert image.shape == (4, 16, 16, 3) and image.dtype == jnp.uint8


def test_sizes_that_are_not_square(noisy_params):
    """Catches height and width swapped on the way through the cascade."""
    ends = run(make_sampler(height=8, width=24), noisy_params(MODEL))
    assert [x.shape for x in ends] == [(4, 4, 12, 3), (4, 8, 24, 3)]


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_fixed_solvers_have_their_order(solver, order):
    """Catches a step that uses a wrong time: the error of x' = tau x must fall by 2^order."""

    def error(count):
        grid = StageGrid(tuple(np.linspace(0, 1, count + 1).tolist()), 0.0, 1.0)
        x = solve_fixed(solver, lambda x, tau: tau * x, jnp.ones(1), grid)
        return abs(float(x[0]) - np.exp(0.5))

    assert np.log2(error(16) / error(32)) == pytest.approx(order, abs=0.25)


def test_scan_equals_diffrax():
    """Catches a fast path that is not the method of that name."""
    taus = np.linspace(0, 1, 8)

    def field(x, tau):
        return jnp.sin(5 * tau) - x**2

    for name, solver in (("euler", diffrax.Euler()), ("heun", diffrax.Heun())):
        ours = solve_fixed(name, field, jnp.ones(3), StageGrid(tuple(taus.tolist()), 0.0, 1.0))
        theirs = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: field(y, t)),
            solver,
            0.0,
            1.0,
            None,
            jnp.ones(3),
            stepsize_controller=diffrax.StepTo(jnp.asarray(taus)),
        ).ys[-1]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_adaptive_solver_meets_its_tolerance():
    """Catches tolerances that are not passed on."""
    exact = np.exp(np.sin(3) / 3)
    for rtol in (1e-3, 1e-5):
        x = solve_adaptive("dopri5", lambda x, tau: jnp.cos(3 * tau) * x, jnp.ones(1), rtol, 1e-6)
        assert abs(float(x[0]) - exact) < 10 * rtol


def test_bad_settings_are_named():
    """Catches settings that would fail deep inside a trace."""
    for kwargs, message in (
        (dict(solver="rk45"), "solver must be one of"),
        (dict(height=18), "height 18"),
        (dict(grid=TimeGrid((1, 2, 3))), "3 entries for 2 stages"),
    ):
        with pytest.raises(UserError, match=message):
            make_sampler(**kwargs)
    for bad in ((0,), (5, -1), ()):
        with pytest.raises(UserError, match="at least 1"):
            TimeGrid(bad)
