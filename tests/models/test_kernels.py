"""Attention kernels against the plain form, and which one is chosen. TPU's is interpreted here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelflow_jax.cascade.packing import Group, PackLayout
from pixelflow_jax.models.attention import _tell_of_all_scores, attention, choose_backend
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.models.flops import forward_flops, traced_flops
from pixelflow_jax.models.rope import apply_rope, rope_table
from pixelflow_jax.models.transformer import PixelFlow

F32 = jnp.float32


def draw(n, m, dtype, head_dim=72):
    rng = np.random.default_rng(0)
    shapes = (2, n, 2, head_dim), (2, m, 2, head_dim), (2, m, 2, head_dim), (2, n, 2, head_dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def assert_close(ours, theirs, tolerance):
    """To a share of the largest entry, as rounding in bfloat16 is."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def assert_equals_einsum(q, k, v, g, tolerance, **kwargs):
    """Compares the kernel with einsum in float32, forward and backward."""
    out, pull = jax.vjp(lambda *args: attention(*args, **kwargs, backend="splash"), q, k, v)
    wide = [x.astype(F32) for x in (q, k, v)]
    expected, pull_wide = jax.vjp(lambda *args: attention(*args, **kwargs, backend="einsum"), *wide)
    assert_close(out, expected, tolerance)
    for ours, theirs in zip(pull(g), pull_wide(g.astype(F32)), strict=True):
        assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "length", [128, *(pytest.param(n, marks=pytest.mark.slow) for n in (256, 640, 1024))]
)
def test_the_tpu_kernel_equals_the_plain_form(length, dtype, tolerance):
    """Catches a wrong scale, block size or layout, both ways, at the released head_dim."""
    assert_equals_einsum(*draw(length, length, dtype), tolerance)


@pytest.mark.parametrize("n, m", [(144, 144), (256, 77)])
def test_the_tpu_kernel_takes_any_length(n, m):
    """Catches padding that is attended to: grids such as 12 x 12, and texts of 77 tokens."""
    assert_equals_einsum(*draw(n, m, F32), 1e-5)


def test_the_tpu_kernel_masks_text():
    """Catches cross-attention to padding, or a mask that is turned round."""
    q, k, v, g = draw(256, 128, F32)
    mask = jnp.arange(128)[None] < jnp.array([[5], [128]])
    assert_equals_einsum(q, k, v, g, 1e-5, key_mask=mask)
    changed = jnp.where(mask[..., None, None], k, 9.0)
    outs = [attention(q, keys, v, mask, backend="splash") for keys in (k, changed)]
    assert (outs[0] == outs[1]).all()


@pytest.mark.parametrize(
    "platform, length, dtype, expected",
    [
        ("tpu v5e", 4096, jnp.bfloat16, "splash"),
        ("tpu v5e", 64, jnp.bfloat16, "einsum"),
        ("gpu", 4096, jnp.bfloat16, "cudnn"),
        ("gpu", 4096, jnp.float32, "einsum"),
        ("cpu", 4096, jnp.float32, "blockwise"),
        ("cpu", 64, jnp.float32, "einsum"),
    ],
)
def test_the_backend_follows_the_platform(platform, length, dtype, expected):
    """Catches a platform that falls back on attention with all scores in memory."""
    x = jax.ShapeDtypeStruct((1, length, 16, 72), dtype)
    assert choose_backend(platform, x, x) == expected


def test_all_scores_at_once_are_told_once(capsys):
    """Catches a run that is slow without a word, a note per trace, and one for text or few tokens."""

    def trace(platform, length, dtype, mask=None):
        x = jax.ShapeDtypeStruct((1, length, 2, 72), dtype)
        jax.eval_shape(lambda x: attention(x, x, x, mask, platform=platform), x)
        return capsys.readouterr().err

    _tell_of_all_scores.cache_clear()
    assert not trace("cpu", 512, jnp.float32) and not trace("tpu v5e", 512, jnp.float32)
    assert not trace("gpu", 128, jnp.float32)
    assert not trace("gpu", 512, jnp.float32, jnp.ones((1, 512), bool))
    said = trace("gpu", 512, jnp.float32)
    assert "einsum" in said and "float32 heads of 72 on gpu" in said
    assert not trace("gpu", 1024, jnp.float32)


@pytest.mark.parametrize("backend, length", [("einsum", 64), ("blockwise", 1024), ("splash", 256)])
def test_attention_does_no_more_work_than_it_must(backend, length):
    """Catches padding, a product done twice, or a backward pass of more than five products."""
    x = jax.ShapeDtypeStruct((3, length, 2, 64), jnp.bfloat16)

    def forward(q, k, v):
        return attention(q, k, v, backend=backend)

    def both_ways(q, k, v, g):
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(g)

    product = 2 * 3 * 2 * length**2 * 64
    assert traced_flops(forward, x, x, x) == 2 * product
    rows = 2 * 3 * 2 * length * 64  # the kernel's sum of gradient times output, a row
    assert 6 * product <= traced_flops(both_ways, x, x, x, x) <= 7 * product + rows


def test_the_gradient_of_the_rotation_is_the_rotation_back():
    """Catches a wrong sign or pair in the transpose that is written by hand."""
    cos, sin = (jnp.asarray(x, F32) for x in rope_table(np.indices((3, 5)).reshape(2, -1).T, 8))
    x, grad = jax.random.normal(jax.random.key(0), (2, 1, 15, 2, 8))
    turned, pull = jax.vjp(lambda x: apply_rope(x, cos, sin), x)
    first = x[..., ::2] * cos[:, None, ::2] - x[..., 1::2] * sin[:, None, ::2]
    assert_close(turned[..., ::2], first, 1e-6)
    np.testing.assert_allclose((pull(grad)[0] * x).sum(), (grad * turned).sum(), rtol=1e-5)
    assert_close(pull(turned)[0], x, 1e-6)


def test_the_network_does_no_more_work_than_it_must():
    """Catches a counter that misses loops, and linear layers that see padding or run twice."""
    model = PixelFlow(2, 16, 3, 2, 5)
    layout = PackLayout((Group(2, 4, 4, 2), Group(2, 8, 8, 2)))
    params = abstract_params(model)
    tokens = [jax.ShapeDtypeStruct((1, 2, group.length, 12), F32) for group in layout.groups]
    labels = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def forward(params, tokens, labels):
        return model.apply({"params": params}, tokens, jnp.zeros((1, 4)), layout, labels)

    def backward(*args):
        return jax.grad(lambda *args: sum(jnp.square(x).sum() for x in forward(*args)))(*args)

    least = forward_flops(model, layout)
    assert 1 <= traced_flops(forward, params, tokens, labels) / least < 1.01
    assert 2.9 < traced_flops(backward, params, tokens, labels) / least < 3.03
