"""A patch size per stage: a cheaper last stage, beyond the paper."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.packing import Group, PackLayout
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model, config_from_dict, load_config
from pixelflow_jax.models.conditioning import init_params
from pixelflow_jax.models.flops import forward_flops, traced_flops
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.models.warm_start import with_patch_sizes
from pixelflow_jax.sampling.generate import build_sampler, make_generate
from pixelflow_jax.sampling.sampler import class_conditions
from pixelflow_jax.training import objective
from pixelflow_jax.training.checkpoints import load_params
from pixelflow_jax.training.loop import prepare, train

from conftest import TINY

MIXED = [*TINY, "model.patch_size=2,4"]


def losses(model, params, x1):
    """Of one row of images, at every stage."""
    keys = jax.random.split(jax.random.key(1), len(x1))[None]
    labels = {"labels": jnp.zeros((1, len(x1)), jnp.int32)}
    batch, layout = objective.corrupt(Cascade(2), model.patch_size, x1[None], labels, keys, 5, 0.0)
    apply = jax.jit(
        lambda p, tokens: model.apply({"params": p}, tokens, batch.timesteps, layout, **labels)
    )
    return objective.loss_per_image(layout, apply(params, batch.tokens), batch.target), layout


def test_equal_sizes_are_the_network_of_one(noisy_params):
    """Catches a tuple that takes another path: all equal must be the official network, bit for bit."""
    one, two = (PixelFlow(2, 8, 2, p, 5) for p in (2, (2, 2)))
    params = noisy_params(one)
    assert jax.tree.map(jnp.shape, init_params(two, 0)) == jax.tree.map(jnp.shape, params)
    x1 = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    assert (losses(one, params, x1)[0] == losses(two, params, x1)[0]).all()


def test_neighbors_of_one_size_share_a_product(noisy_params):
    """Catches an embedding or a head that runs once per group, and sizes that meet again unshared."""

    def products(patch_size):
        model = PixelFlow(2, 8, 1, patch_size, 5)
        layout = PackLayout(tuple(Group(1, 2, 2, p) for p in cascade.patches(patch_size)))
        tokens = [jnp.zeros((1, 1, 4, 3 * g.patch_size**2)) for g in layout.groups]
        labels = jnp.zeros((1, 4), jnp.int32)
        args = (tokens, labels * 1.0, layout, labels)
        return str(
            jax.make_jaxpr(lambda p: model.apply({"params": p}, *args))(noisy_params(model))
        ).count("dot_general[")

    cascade = Cascade(4)
    one = products(2)
    assert products((2, 2, 2, 2)) == one
    assert products((2, 2, 4, 4)) == one + 2
    assert products((2, 4, 2, 2)) == one + 4


def test_a_row_of_two_sizes_gives_each_image_its_own_loss(noisy_params):
    """Catches tokens of one size that go through the other's layers, or losses of the wrong tokens."""
    model = PixelFlow(2, 8, 2, (2, 4), 5)
    params = noisy_params(model)
    assert params["patch_embed_4"]["kernel"].shape == (48, 16)
    assert params["head"]["kernel"].shape == (16, 12)
    x1 = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    together, layout = losses(model, params, x1)
    assert [(g.length, g.patch_size) for g in layout.groups] == [(16, 2), (16, 4)]
    for name, others, own in (
        ("patch_embed", slice(2, 4), slice(0, 2)),
        ("head_4", slice(0, 2), slice(2, 4)),
    ):
        changed = {**params, name: jax.tree.map(lambda x: x + 0.1, params[name])}
        found, _ = losses(model, changed, x1)
        assert (found[0, others] == together[0, others]).all()
        assert (found[0, own] != together[0, own]).all()


def test_the_size_embedding_counts_the_smallest_patches(noisy_params):
    """Catches a network that is told half the resolution where its patches are twice as large."""
    model, layout = PixelFlow(2, 8, 2, (2, 4), 5), PackLayout((Group(1, 4, 4, 4),))
    params, zero = noisy_params(model), jnp.zeros((1, 1), jnp.int32)

    def size_embedding(layout, p):
        found = []

        def keep(next_fn, args, kwargs, context):
            out = next_fn(*args, **kwargs)
            if context.module.name == "size_embed":
                found.append(out)
            return out

        with nn.intercept_methods(keep):
            tokens = [jnp.zeros((1, 1, layout.row_length, 3 * p * p))]
            model.apply({"params": params}, tokens, jnp.zeros((1, 1)), layout, zero)
        return found[0]

    same = PackLayout((Group(1, 8, 8, 2),))
    np.testing.assert_array_equal(size_embedding(layout, 4), size_embedding(same, 2))


def test_it_trains_samples_and_costs_what_it_says(tmp_path):
    """Catches a step, a sampler or a count of operations that knows one patch size only."""
    config = load_config("configs/digits.py", MIXED)
    assert config_from_dict(config.to_dict()).model.patch_size == (2, 4)
    train(config, str(tmp_path / "run"))
    sampler = build_sampler(config)
    params = init_params(sampler.model, 0)
    out = make_generate(sampler)(params, {"index": np.arange(3)}, *class_conditions(np.arange(3), 10))
    assert out.pixels.shape == (3, 16, 16, 3) and out.finite.all()
    layout = sampler.layout(1, 2)
    model = build_model(config)
    tokens = [jnp.zeros((1, 2, layout.groups[0].length, 48))]

    def forward(params, tokens):
        return model.apply(
            {"params": params}, tokens, jnp.zeros((1, 2)), layout, jnp.zeros((1, 2), jnp.int32)
        )

    assert 1 <= traced_flops(forward, params, tokens) / forward_flops(model, layout) < 1.01


def test_a_patch_size_that_the_model_lacks(noisy_params):
    """Catches a missing parameter in place of a reason."""
    model, layout = PixelFlow(2, 8, 1, (2, 4), 5), PackLayout((Group(1, 2, 2, 8),))
    zero = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=r"patch sizes \[2, 4\], the layout also \{8\}"):
        model.apply({"params": noisy_params(model)}, [jnp.zeros((1, 1, 4, 192))], zero, layout, zero)


def test_a_larger_patch_begins_as_the_smaller_ones_that_tile_it(noisy_params):
    """Catches pixels, channels or biases that land elsewhere, and a size that loses its own layers."""
    params = noisy_params(PixelFlow(2, 8, 2, (2, 4), 5))
    grown = with_patch_sizes(params, (2, 4), (4, 8, 2))
    assert jax.tree.map(jnp.shape, init_params(PixelFlow(2, 8, 2, (2, 4, 8), 5), 0)) == jax.tree.map(
        jnp.shape, grown
    )
    for name in params:
        assert grown[name] is params[name]
    four = jax.random.normal(jax.random.key(0), (2, 4, 2, 4, 3))  # patches, each of which fills an 8x8
    image = jnp.tile(four, (1, 2, 1, 2, 1)).reshape(16, 16, 3)

    def embedded(p, layer):  # [rows, columns, width]
        return (images.patchify(image, p) @ layer["kernel"] + layer["bias"]).reshape(
            16 // p, 16 // p, -1
        )

    small, large = embedded(4, grown["patch_embed_4"]), embedded(8, grown["patch_embed_8"])
    mixed = grown["patch_embed_8"]["kernel"].reshape(2, 4, 2, 4, 3, -1)
    assert (mixed[0] != mixed[1]).all()  # or neither layer would get a gradient for differences
    np.testing.assert_allclose(large, images.down(small), atol=1e-5)

    def drawn(p, layer, states):
        tokens = states.reshape(-1, states.shape[-1]) @ layer["kernel"] + layer["bias"]
        return images.unpatchify(tokens, 16, 16, p)

    np.testing.assert_allclose(
        drawn(8, grown["head_8"], large), drawn(4, grown["head_4"], images.up(large)), atol=1e-5
    )
    assert with_patch_sizes(params, (2, 4), (4, 4))["patch_embed"] is params["patch_embed_4"]
    with pytest.raises(UserError, match="patch_size 6 must be a multiple of a size .* 4"):
        with_patch_sizes(params, (4,), (4, 6))


def test_a_token_stands_at_the_middle_of_its_patch():
    """Catches larger patches that are told other places than the smaller ones that tile them."""
    small, large = (PackLayout((Group(2, 8 // p, 4 // p, p),)).positions(2) for p in (2, 4))
    assert (small[:8] == np.indices((4, 2)).reshape(2, -1).T).all()
    tiles = small[:8].reshape(2, 2, 1, 2, 2).swapaxes(1, 2).reshape(2, 4, 2)
    assert (large[:2] == tiles.mean(axis=1)).all() and (large[2:] == large[:2]).all()


def test_a_run_begins_from_other_patch_sizes(tmp_path):
    """Catches init_from that refuses them, averages without the new layers, or other changes."""
    train(load_config("configs/digits.py", [*TINY, "model.patch_size=2"]), str(tmp_path / "old"))
    old = load_params(tmp_path / "old")[0]
    config = load_config("configs/digits.py", [*MIXED, f"init_from={tmp_path / 'old'}"])
    state = prepare(config)[0]
    assert state.step == 0 and state.params.keys() == {*old, "patch_embed_4", "head_4"}
    for average in state.opt_state["ema"].averages:
        jax.tree.map(np.testing.assert_array_equal, average, state.params)
    for name in old:
        jax.tree.map(np.testing.assert_array_equal, old[name], state.params[name])


@pytest.mark.parametrize(
    "sizes, reason",
    [
        ("2,2,2", "one per stage"),
        ("2,3", "a multiple of the smallest"),
        ("0", "at least 1"),
        ("2,64", "multiple of"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, reason):
    """Catches a traceback, or a network with patches that do not fill the image."""
    with pytest.raises(UserError, match=reason):
        load_config("configs/digits.py", [f"model.patch_size={sizes}"])
