"""Cascade, images and time grids: properties for any number of stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.renoising import correlate_blocks
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError
from pixelflow_jax.sampling.grids import TimeGrid


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5, 7])
def test_windows_and_times_are_in_order(num_stages):
    """Catches a window or a share of the time axis that is empty, reversed or has a gap."""
    cascade = Cascade(num_stages)
    assert cascade.start[0] == 0 and cascade.end[-1] == 1
    for stage in range(num_stages):
        assert cascade.start[stage] < cascade.end[stage]
        assert (np.diff(cascade.timesteps[stage]) > 0).all()
    for before, after in zip(cascade.timesteps[:-1], cascade.timesteps[1:], strict=True):
        assert before[-1] < after[0]
    assert cascade.timesteps[0, 0] == 0 and cascade.timesteps[-1, -1] == 999


@pytest.mark.parametrize("gamma", [-1 / 3, -0.2, -0.05])
@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_renoising_lands_on_the_next_window(num_stages, gamma):
    """Catches wrong alpha or beta: mean and covariance after the jump must be the window's.

    A stage ends at o x1 + (1-o) e; the next starts at start Up(x1) + (1-start) e with e white. After
    alpha Up(.) + beta n the mean is alpha o, the covariance in a block alpha^2 (1-o)^2 11^T + beta^2 C.
    """
    cascade = Cascade(num_stages, gamma)
    ones = np.ones((4, 4))
    block_noise = (1 - gamma) * np.eye(4) + gamma * ones
    for stage in range(1, num_stages):
        o, start = cascade.original_start[stage], cascade.start[stage]
        alpha, beta = cascade.renoising(stage)
        assert alpha * o == pytest.approx(start, rel=1e-9)
        covariance = alpha**2 * (1 - o) ** 2 * ones + beta**2 * block_noise
        np.testing.assert_allclose(covariance, (1 - start) ** 2 * np.eye(4), atol=1e-9)


@pytest.mark.parametrize("gamma", [-1 / 3, -0.1])
def test_block_noise_has_its_covariance(gamma):
    """Catches a wrong scale or a wrong axis in the correlated noise."""
    z = jax.random.normal(jax.random.key(0), (1, 512, 512, 1))
    n = np.asarray(correlate_blocks(z, gamma))[0, :, :, 0]
    blocks = n.reshape(256, 2, 256, 2).swapaxes(1, 2).reshape(-1, 4)
    expected = (1 - gamma) * np.eye(4) + gamma
    np.testing.assert_allclose(np.cov(blocks, rowvar=False), expected, atol=0.03)


def test_down_undoes_up_and_patches_go_back():
    """Catches swapped axes, on an image that is not square."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    np.testing.assert_allclose(images.down(images.up(x)), x, rtol=1e-6)
    assert (images.unpatchify(images.patchify(x, 4), 8, 12, 4) == x).all()
    first = images.patchify(x, 4)[0, 1].reshape(4, 4, 3)  # the second token is the second column
    assert (first == x[0, :4, 4:8]).all()


def test_uint8_goes_there_and_back():
    """Catches an off-by-one in the pixel rule."""
    x = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    assert (images.to_uint8(images.from_uint8(x)) == x).all()


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["uniform", "reference"])
def test_grids_go_from_0_to_1(kind, shift):
    """Catches a grid that stops short, turns back, or sees times outside its stage's share."""
    cascade = Cascade(3)
    for stage in range(3):
        grid = TimeGrid((4, 1, 6), kind, shift).stage(cascade, stage)
        taus = np.array(grid.taus)
        assert len(taus) == (4, 1, 6)[stage] + 1
        assert taus[0] == 0 and taus[-1] == 1 and (np.diff(taus) > 0).all()
        low, high = cascade.timesteps[stage][[0, -1]]
        times = grid.timestep(taus[:-1])
        assert times[0] == low and (times <= high + 1).all()


def test_uniform_has_no_wasted_step():
    """Catches the official grid's 0.001 step returning in the default."""
    assert min(np.diff(TimeGrid((10,)).stage(Cascade(2), 1).taus)) == pytest.approx(0.1)


@pytest.mark.parametrize("size", [0, -64, 31, 250])
def test_sizes_that_do_not_fit_are_named(size):
    """Catches sizes that would break deep inside a reshape."""
    with pytest.raises(UserError, match="multiple of 32"):
        Cascade(4).check_size(size, 64, 4)
    Cascade(4).check_size(32, 96, 4)
