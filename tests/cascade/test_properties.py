"""Properties over generated sizes and settings (Hypothesis)."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.packing import Group, PackLayout
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError
from pixelflow_jax.sampling.generate import fit_image
from pixelflow_jax.sampling.grids import KINDS, TimeGrid
from pixelflow_jax.sampling.guidance import SCHEDULES, Guidance

settings.register_profile("house", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("house")

stages = st.integers(1, 6)
gammas = st.floats(-1 / 3, -1e-3)


@given(stages, gammas)
def test_windows(num_stages, gamma):
    """Catches windows out of order, a gap in time, or a stage that starts after it should."""
    cascade = Cascade(num_stages, gamma)
    assert cascade.start[0] == 0 and cascade.end[-1] == 1
    for s in range(num_stages):
        assert 0 <= cascade.start[s] <= cascade.original_start[s] < cascade.end[s] <= 1
        if s:
            assert cascade.original_start[s] == cascade.end[s - 1] and cascade.start[s] > 0


@given(stages, gammas)
def test_the_network_s_time_rises(num_stages, gamma):
    """Catches a table that repeats or leaves [0, 999], or a line that misses its points."""
    cascade = Cascade(num_stages, gamma)
    flat = cascade.timesteps.ravel()
    assert (np.diff(flat) > 0).all() and flat[0] == 0 and flat[-1] == 999
    for s in range(num_stages):
        begin, slope = cascade.timestep_line(s)
        line = begin + slope * np.arange(1000) / 1000
        np.testing.assert_allclose(line, cascade.timesteps[s], atol=1e-9 * 1000)


@given(st.integers(2, 6), gammas)
def test_renoising_meets_the_next_stage(num_stages, gamma):
    """Catches a step up whose mean or variance is not that of the next stage's start.

    After a stage, x = o image + (1 - o) noise; Up repeats the noise in a block of four.
    """
    cascade = Cascade(num_stages, gamma)
    for s in range(1, num_stages):
        o, (alpha, beta) = cascade.original_start[s], cascade.renoising(s)
        assert alpha * o == pytest.approx(cascade.start[s])
        variance = (alpha * (1 - o)) ** 2 + beta**2
        covariance = (alpha * (1 - o)) ** 2 + beta**2 * gamma
        assert variance == pytest.approx((1 - cascade.start[s]) ** 2)
        assert covariance == pytest.approx(0, abs=1e-12)


sizes = st.integers(1, 4)


@given(st.integers(1, 4), sizes, sizes, st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
@settings(max_examples=25)
def test_images_there_and_back(num_stages, rows, columns, patch, seed):
    """Catches a size that the cascade allows and the image functions do not, or a lost pixel."""
    cascade = Cascade(num_stages)
    unit = cascade.unit(patch)
    height, width = rows * unit, columns * unit
    cascade.check_size(height, width, patch)
    x = np.random.default_rng(seed).normal(size=(1, height, width, 3)).astype(np.float32)
    tokens = images.patchify(x, patch)
    assert tokens.shape == (1, height * width // patch**2, 3 * patch**2)
    np.testing.assert_array_equal(images.unpatchify(tokens, height, width, patch), x)
    for s in reversed(range(num_stages - 1)):
        small = images.down(x)
        assert small.shape[1:3] == cascade.size(s, height, width)
        np.testing.assert_allclose(images.down(images.up(small)), small, atol=1e-6)
        np.testing.assert_allclose(small.mean((1, 2)), np.asarray(x).mean((1, 2)), atol=1e-5)
        x = small


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 4), st.sampled_from([1, 2, 4, 8]))
def test_sizes_are_allowed_or_named(height, width, num_stages, patch):
    """Catches a size that is refused though it fits, or whose suggestion does not fit."""
    cascade, unit = Cascade(num_stages), Cascade(num_stages).unit(patch)
    try:
        cascade.check_size(height, width, patch)
    except UserError as error:
        assert height % unit or width % unit
        offered = [int(word) for word in str(error).rpartition("try ")[2].split() if word.isdigit()]
        assert offered
        for side in offered:
            cascade.check_size(side, side, patch)
    else:
        assert height % unit == 0 and width % unit == 0


groups = st.lists(
    st.builds(Group, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4
)


@given(groups, st.integers(1, 2))
def test_packing_loses_nothing(found, rows):
    """Catches tokens that are lost, doubled or moved by a row of mixed sizes."""
    layout = PackLayout(tuple(found))
    tokens = sum(g.count * g.height * g.width for g in found)
    assert (layout.row_length, layout.num_sequences) == (tokens, sum(g.count for g in found))
    x = np.arange(rows * tokens * 2, dtype=np.float32).reshape(rows, tokens, 2)
    parts = layout.unpack(x)
    assert [part.shape[1:3] for part in parts] == [(g.count, g.height * g.width) for g in found]
    np.testing.assert_array_equal(layout.pack(list(parts)), x)
    each = np.arange(layout.num_sequences, dtype=np.float32)[None, :, None]
    spread = np.asarray(layout.to_tokens(jnp.asarray(each)))[0, :, 0]
    lengths = [g.height * g.width for g in found for _ in range(g.count)]
    np.testing.assert_array_equal(spread, np.repeat(np.arange(len(lengths)), lengths))


@given(st.floats(-5, 30), st.sampled_from(SCHEDULES), stages, st.floats(0, 1), st.floats(0, 1))
def test_guidance(scale, schedule, num_stages, low, high):
    """Catches a weight outside 1..scale, one that falls from stage to stage, or a wrong end."""
    assume(low < high)
    try:
        weights = Guidance(scale, schedule, (low, high)).weights(num_stages)
    except UserError:
        assert schedule == "reference" and num_stages > 4
        return
    assert len(weights) == num_stages
    if scale <= 0:
        assert set(weights) == {1.0}
        return
    inside = sorted((1.0, scale))
    assert all(inside[0] - 1e-9 <= w <= inside[1] + 1e-9 for w in weights)
    rising = np.diff(weights) * (scale - 1)
    assert (rising >= -1e-9).all()
    if schedule == "constant" or (schedule == "stagewise" and num_stages > 1):
        assert weights[-1] == pytest.approx(scale)


@given(st.integers(1, 60), st.sampled_from(KINDS), st.floats(0.2, 8.0), stages)
def test_grids(num_steps, kind, shift, num_stages):
    """Catches a grid that does not run from 0 to 1, turns back, or has another number of steps."""
    cascade = Cascade(num_stages)
    try:
        grid = TimeGrid((num_steps,), kind, shift)
        found = [grid.stage(cascade, s) for s in range(num_stages)]
    except UserError:
        return
    for s, stage in enumerate(found):
        taus = np.array(stage.taus)
        assert taus[0] == 0 and taus[-1] == 1 and (np.diff(taus) > 0).all()
        assert len(taus) - 1 <= num_steps + (kind == "reference")
        times = stage.timestep(taus)
        assert cascade.timesteps[s][0] - 1e-6 <= times.min() and times.max() <= 1000
        back = stage.backwards().backwards()
        assert back == stage
        part = stage.after(0.5)
        assert part.taus[0] == 0.5 and part.taus[-1] == 1
    assert math.isclose(found[-1].timestep(1.0), 999, abs_tol=2.0)


@given(*(st.integers(1, 400) for _ in range(4)))
@example(200, 347, 192, 336)  # whose crop rounds to a box that begins outside
def test_any_picture_fits_any_size(have_h, have_w, height, width):
    """Catches a crop that leaves the picture, is off its middle, or exchanges height and width."""
    y, x = np.mgrid[:have_h, :have_w]
    odd = np.stack([abs(2 * y + 1 - have_h), abs(2 * x + 1 - have_w), y * 0], axis=-1)  # mirror images
    fitted = fit_image(odd.clip(0, 255).astype(np.uint8), height, width)
    assert fitted.shape == (height, width, 3) and -1 <= fitted.min() and fitted.max() <= 1
    np.testing.assert_allclose(fitted, fitted[::-1, ::-1], atol=2.1 / 255)
