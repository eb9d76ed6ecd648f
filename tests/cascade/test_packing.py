"""Packing: round trips, and no leak between the images of a row."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelflow_jax.cascade.packing import Group, PackLayout
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.models.attention import attention
from pixelflow_jax.models.transformer import Block, PixelFlow
from pixelflow_jax.training import objective

LAYOUT = PackLayout((Group(2, 1, 1), Group(3, 2, 3), Group(1, 4, 4)))


def segment_ids(layout):
    """The index of the sequence that each token belongs to."""
    lengths = [group.length for group in layout.groups for _ in range(group.count)]
    return np.repeat(np.arange(layout.num_sequences), lengths)


def test_pack_and_unpack_are_inverse():
    """Catches groups that trade places."""
    parts = [
        jnp.arange(2.0 * g.count * g.length * 5).reshape(2, g.count, g.length, 5) for g in LAYOUT.groups
    ]
    row = LAYOUT.pack(parts)
    assert row.shape == (2, LAYOUT.row_length, 5)
    for before, after in zip(parts, LAYOUT.unpack(row), strict=True):
        assert (before == after).all()


def test_tokens_positions_and_segments_agree():
    """Catches a per-sequence vector, position or id that lands on another sequence's tokens."""
    ids = jnp.arange(LAYOUT.num_sequences, dtype=jnp.float32)[None, :, None]
    segments = segment_ids(LAYOUT)
    assert (LAYOUT.to_tokens(ids)[0, :, 0] == segments).all()
    positions = LAYOUT.positions()
    assert positions.shape == (LAYOUT.row_length, 2)
    for i in range(LAYOUT.num_sequences):
        own = positions[segments == i]
        assert (own[0] == 0).all() and len(np.unique(own, axis=0)) == len(own)
    tokens = LAYOUT.unpack(LAYOUT.to_tokens(ids))
    losses = objective.loss_per_image(LAYOUT, tokens, [jnp.zeros_like(x) for x in tokens])
    np.testing.assert_allclose(losses[0], ids[0, :, 0] ** 2)


def test_a_block_sees_one_row(noisy_params):
    """Catches blocks that run group by group, or one patch size at a time."""
    model = PixelFlow(2, 8, 2, (2, 4), num_classes=3)
    layout = PackLayout((Group(2, 2, 2, 2), Group(1, 4, 4, 2), Group(3, 2, 3, 4)))
    tokens = [jnp.zeros((5, g.count, g.length, 3 * g.patch_size**2)) for g in layout.groups]
    seen = []

    def keep(next_fn, args, kwargs, context):
        if isinstance(context.module, Block) and context.method_name == "__call__":
            seen.append(args[0].shape)
        return next_fn(*args, **kwargs)

    params, labels = noisy_params(model), jnp.zeros((5, 6), jnp.int32)
    with nn.intercept_methods(keep):
        out = jax.eval_shape(
            lambda p: model.apply({"params": p}, tokens, labels * 1.0, layout, labels), params
        )
    assert seen and set(seen) == {(5, 2 * 4 + 16 + 3 * 6, 16)}
    assert [x.shape for x in out] == [x.shape for x in tokens]


def packed_model(noisy_params, dtype=jnp.float32):
    model = PixelFlow(2, 8, 2, 2, num_classes=3, dtype=dtype)
    return model, noisy_params(model)


def flow_batch(x1, seed=0):
    keys = jax.random.split(jax.random.key(seed), x1.shape[:2])
    labels = jnp.arange(x1.shape[1], dtype=jnp.int32)[None] % 3
    return objective.corrupt(Cascade(2), 2, x1, {"labels": labels}, keys, 3, 0.1)


def test_a_neighbour_changes_no_bit(noisy_params):
    """Catches attention, norms or modulation that reach into another image of the row."""
    model, params = packed_model(noisy_params)
    x1 = jax.random.uniform(jax.random.key(1), (1, 6, 8, 8, 3), minval=-1)
    _, layout = flow_batch(x1)

    @jax.jit
    def run(x1):
        batch, _ = flow_batch(x1)
        args = (batch.tokens, batch.timesteps, layout, batch.condition["labels"])
        return layout.pack(model.apply({"params": params}, *args))

    segments, order = segment_ids(layout), [0, 2, 4, 1, 3, 5]  # coarse stage first
    before = np.asarray(run(x1))
    for image in range(6):
        after = np.asarray(run(x1.at[0, image].set(0.5)))
        changed = (before != after).any(axis=(0, 2))
        own = segments == order.index(image)
        assert changed[own].any() and not changed[~own].any()


def test_gradient_across_images_is_exactly_zero(noisy_params):
    """Catches a leak too small to see in values: d loss_i / d pixels_j must be 0 for i != j."""
    model, params = packed_model(noisy_params)
    x1 = jax.random.uniform(jax.random.key(1), (1, 4, 8, 8, 3), minval=-1)

    def losses(x1):
        batch, layout = flow_batch(x1)
        args = (batch.tokens, batch.timesteps, layout, batch.condition["labels"])
        return objective.loss_per_image(layout, model.apply({"params": params}, *args), batch.target)[0]

    jacobian = np.asarray(jax.jit(jax.jacrev(losses))(x1))[:, 0]  # [sequence, image, h, w, c]
    for sequence, image in enumerate([0, 2, 1, 3]):
        others = np.delete(jacobian[sequence], image, axis=0)
        assert np.abs(jacobian[sequence, image]).max() > 0
        assert (others == 0).all()


@pytest.mark.parametrize("backend", ["einsum", "blockwise"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_backends_match_float64(backend, masked):
    """Catches a wrong scale, mask or block order, forward and backward."""
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(2, 512, 2, 8)) for _ in range(4))
    mask = rng.random((2, 512)) < 0.7 if masked else np.ones((2, 512), bool)

    def truth(q, k, v):
        scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8)
        weights = np.exp(scores) * mask[:, None, None]
        return weights / weights.sum(-1, keepdims=True)

    weights = truth(q, k, v)
    expected = np.einsum("bhnm,bmhd->bnhd", weights, v)
    as32 = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    key_mask = jnp.asarray(mask) if masked else None
    out, pull = jax.vjp(lambda *args: attention(*args, key_mask, backend=backend), *as32)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    grad_v = np.einsum("bhnm,bnhd->bmhd", weights, g)
    grads = pull(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(grads[2], grad_v, atol=2e-5)
    to_weights = np.einsum("bnhd,bmhd->bhnm", g, v)
    to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True)) / np.sqrt(8)
    np.testing.assert_allclose(grads[0], np.einsum("bhnm,bmhd->bnhd", to_scores, k), atol=2e-5)
    np.testing.assert_allclose(grads[1], np.einsum("bhnm,bnhd->bmhd", to_scores, q), atol=2e-5)


def test_blockwise_attention_under_vmap():
    """Catches a batching rule that mixes images up: error-controlled steps run an image a lane."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 1, 256, 2, 8)), jnp.float32) for _ in range(3))
    run = functools.partial(attention, backend="blockwise")
    mapped = jax.vmap(run, in_axes=(0, None, 0))(q, k[0], v)
    for i in range(3):
        np.testing.assert_allclose(mapped[i], run(q[i], k[0], v[i]), atol=1e-6)


def test_text_padding_changes_no_bit(noisy_params):
    """Catches cross-attention that sees padding: other values or more of it must change nothing."""
    model = PixelFlow(2, 8, 2, 2, context_dim=6)
    params = noisy_params(model)
    layout = PackLayout((Group(1, 4, 4, 2), Group(1, 2, 2, 2)))
    tokens = layout.unpack(jax.random.normal(jax.random.key(0), (1, 20, 12)))
    text = jax.random.normal(jax.random.key(1), (1, 2, 5, 6))
    mask = jnp.arange(5)[None, None] < jnp.array([[[3], [4]]])

    def run(text, mask):
        timesteps = jnp.array([[10.0, 900.0]])
        return layout.pack(model.apply({"params": params}, tokens, timesteps, layout, None, text, mask))

    before = run(text, mask)
    assert (run(jnp.where(mask[..., None], text, 7.0), mask) == before).all()
    for more in (3, 123):
        longer = jnp.pad(text, [(0, 0), (0, 0), (0, more), (0, 0)], constant_values=3.0)
        assert (run(longer, jnp.pad(mask, [(0, 0), (0, 0), (0, more)])) == before).all(), more
    assert not (run(text + mask[..., None], mask) == before).all()
