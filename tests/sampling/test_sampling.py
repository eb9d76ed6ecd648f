"""Sampling: guidance, solvers, invariance to the batch, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.sampling import sampler as sampler_room
from pixelflow_jax.sampling.adaptive import solve_adaptive
from pixelflow_jax.sampling.generate import make_generate
from pixelflow_jax.sampling.grids import TimeGrid
from pixelflow_jax.sampling.guidance import Guidance
from pixelflow_jax.sampling.sampler import Sampler, class_conditions
from pixelflow_jax.sampling.solvers import CONTROLS, ORDERS, SOLVERS, WITHOUT_ERROR, solve_fixed
from pixelflow_jax.sampling.starts import FromSeed, image_keys

from diffrax_fixed import solve_fixed_diffrax

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
    grid = TimeGrid((1,)).stage(Cascade(2), 0)

    def velocity(weight, *pair):
        return make_sampler().field(params, grid, weight, *pair)(x, jnp.float32(0.5))

    cond, uncond = velocity(1.0, *conditions), velocity(1.0, *conditions[::-1])
    guided = velocity(2.5, *conditions)
    np.testing.assert_allclose(guided, uncond + 2.5 * (cond - uncond), rtol=1e-4, atol=1e-5)

    def flops(scale):
        sampler = make_sampler(guidance=Guidance(scale, "constant"))
        arguments = (params, sampler.draw_noise(image_keys(0, jnp.arange(2))), *conditions)
        return jax.jit(sampler.sample).lower(*arguments).cost_analysis()["flops"]

    assert 1.8 < flops(2.0) / flops(1.0) < 2.2


@pytest.mark.slow
def test_guidance_interval(noisy_params):
    """Catches an interval that guides everywhere or nowhere, for fixed steps and adaptive ones."""
    params, loose = noisy_params(MODEL), dict(rtol=0.1, atol=0.1)

    def image(solver, **kwargs):
        guidance = Guidance(3.0, "constant", **kwargs)
        return run(make_sampler(guidance=guidance, solver=solver, **loose), params)[-1]

    for solver in ("euler", "bosh3"):
        whole, part = image(solver), image(solver, interval=(0.3, 0.8))
        assert np.abs(whole - part).max() > 1e-3
        plain = run(make_sampler(guidance=Guidance(1.0), solver=solver, **loose), params)[-1]
        assert np.abs(plain - part).max() > 1e-3


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
        image = generate(
            params, FromSeed(0).inputs(np.arange(4) + seed), *class_conditions(labels, 10)
        ).pixels
    assert generate._cache_size() == 1
    assert image.shape == (4, 16, 16, 3) and image.dtype == jnp.uint8


def test_sizes_that_are_not_square(noisy_params):
    """Catches height and width swapped on the way through the cascade."""
    ends = run(make_sampler(height=8, width=24), noisy_params(MODEL))
    assert [x.shape for x in ends] == [(4, 4, 12, 3), (4, 8, 24, 3)]


def velocity_of_a_number(x, tau):
    """x': nonlinear, dependent on time, and no accidental cancellation of a method's errors."""
    return jnp.sin(5 * tau) + x * jnp.cos(2 * tau) - 0.3 * x**2


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_have_their_order(solver):
    """Catches a wrong coefficient or time: the error must fall with the order's power of the step.

    The steps are of three sizes in turn, so that AB2's formula for uneven steps is tried too.
    """
    with jax.enable_x64(True):

        def end(name, count):
            cuts = np.cumsum([0, *np.resize([1.0, 0.6, 1.4], count)])
            return solve_fixed(name, velocity_of_a_number, jnp.full(1, 0.5), cuts / cuts[-1])

        exact = end("dopri8", 300)
        counts = (6, 12) if solver == "dopri8" else (48, 96)
        errors = [float(jnp.abs(end(solver, count) - exact).max()) for count in counts]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[solver], abs=0.25)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scan_equals_diffrax(solver):
    """Catches a fast path that is not the method of that name."""
    cuts = np.cumsum([0, *np.resize([1.0, 0.6, 1.4], 7)])
    taus = cuts / cuts[-1]
    with jax.enable_x64(True):
        ours, theirs = (
            solve(solver, velocity_of_a_number, jnp.array([0.5, 1.5, 3]), taus)
            for solve in (solve_fixed, solve_fixed_diffrax)
        )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_adaptive_solver_meets_its_tolerance():
    """Catches tolerances that are not passed on, forwards and backwards."""
    exact = np.exp(np.sin(3) / 3)
    for rtol in (1e-3, 1e-5):
        for span, expected in (((0.0, 1.0), exact), ((1.0, 0.0), 1 / exact)):
            x, _ = solve_adaptive(
                "dopri5", lambda x, tau: jnp.cos(3 * tau) * x, jnp.ones(1), rtol, 1e-6, span
            )
            assert abs(float(x[0]) - expected) < 10 * rtol


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in WITHOUT_ERROR])
def test_evaluations_are_counted_exactly(solver):
    """Catches a count that leaves out the first step's size, rejected steps or shared evaluations."""
    calls = []

    def field(x, tau):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.where(tau > 0.6, 30.0, 1.0) * jnp.cos(9 * tau) * x  # the jump makes it reject steps

    _, count = jax.jit(lambda x: solve_adaptive(solver, field, x, 1e-3, 1e-5))(jnp.ones(3))
    jax.effects_barrier()
    assert int(count) == len(calls) > 10


@pytest.mark.slow
def test_evaluations_of_a_run(noisy_params):
    """Catches counts that are of the batch where they must be of each image, and the other way round."""
    params = noisy_params(MODEL)

    def nfe(*batches, **kwargs):
        sampler, found = make_sampler(**kwargs), []
        sample = jax.jit(sampler.run)
        for labels in batches or [(0, 1, 2)]:
            labels = jnp.array(labels)
            noise, conditions = sampler.draw_noise(image_keys(0, labels)), class_conditions(labels, 10)
            found.append(np.asarray(sample(params, noise, *conditions).nfe))
        return found if batches else found[0]

    assert nfe(solver="heun", grid=TimeGrid((3, 5))).tolist() == [[6, 10]] * 3
    assert nfe(solver="dopri5", step_control="fixed").tolist() == [[18, 18]] * 3
    loose = dict(solver="bosh3", rtol=0.1, atol=0.1)
    one, other = nfe((0, 1, 2), (0, 7, 8), **loose)
    assert one[0].tolist() == other[0].tolist() and one[1:].tolist() != other[1:].tolist()
    assert len(set(map(tuple, nfe(**loose, step_control="per_batch")))) == 1


def test_bad_settings_are_named():
    """Catches settings that would fail deep inside a trace."""
    for kwargs, message in (
        (dict(solver="rk45"), "solver must be one of"),
        (dict(solver="ab2", step_control="per_image"), "does not estimate its error"),
        (dict(step_control="always"), "step_control must be one of"),
        (dict(rtol=0.0), "rtol must lie"),
        (dict(height=18), "height 18"),
        (dict(grid=TimeGrid((1, 2, 3))), "3 entries for 2 stages"),
    ):
        with pytest.raises(UserError, match=message):
            make_sampler(**kwargs)
    for bad in ((0,), (5, -1), ()):
        with pytest.raises(UserError, match="at least 1"):
            TimeGrid(bad)


def controls():
    """Every solver with every control that it has."""
    kinds = {name: ("fixed",) if name in WITHOUT_ERROR else CONTROLS[1:] for name in SOLVERS}
    return [
        pytest.param(
            name,
            control,
            marks=[pytest.mark.slow]
            * ((name, control) not in (("euler", "fixed"), ("dopri5", "per_image"))),
        )
        for name, found in kinds.items()
        for control in found
    ]


@pytest.mark.parametrize("solver, control", controls())
def test_the_limit_of_tokens_bounds_the_memory(solver, control, monkeypatch):
    """Catches temporaries of the network that grow with the batch, under vmap too."""
    monkeypatch.setattr(sampler_room, "CPU_TOKENS", 2 * 2 * 64)  # two images with their two halves
    model = PixelFlow(4, 16, 1, 2, num_classes=10)
    times = TimeGrid((2,))
    sampler = Sampler(model, Cascade(1), 16, 16, times, Guidance(2.0), solver, step_control=control)
    params = abstract_params(model)

    def temporaries(count):
        index = jax.ShapeDtypeStruct((count,), jnp.int32)
        conditions = ({"labels": index},) * 2
        compiled = make_generate(sampler).lower(params, {"index": index}, *conditions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(2), temporaries(64)
    # What an image adds: itself and its noise; where the batch has one error control, all slopes too
    state = 4 * 16 * 16 * 3 * (60 if control == "per_batch" else 30)
    assert many < few + 62 * state, (few, many, (many - few) / 62 / (4 * 16 * 16 * 3))
