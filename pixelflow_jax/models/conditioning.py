"""What the network is conditioned on: labels, text states, or token ids to encode into text states."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pixelflow_jax.cascade.packing import Group, PackLayout
from pixelflow_jax.common import numerics
from pixelflow_jax.models.t5 import T5Encoder
from pixelflow_jax.models.transformer import PixelFlow

# Keys are arguments of PixelFlow.__call__, or "text_ids" and "text_mask" for an encoder in the model.
# The leading axes are those of the images.
Condition = dict[str, Array]
INTERVAL = "interval_embed"  # the key, in the parameters, of what a student has and its teacher lacks
TEXT = "text_encoder"  # the key, in the parameters, of an encoder that is trained with the model


@numerics.pinned()
def init_params(model: PixelFlow, seed: int) -> dict:
    """Return fresh parameters. They do not depend on the layout that they are traced with."""
    patches = model.patch_sizes
    layout, count = PackLayout(tuple(Group(1, 1, 1, p) for p in patches)), len(patches)
    tokens = [jnp.zeros((1, 1, 1, 3 * p**2)) for p in patches]
    labels = jnp.zeros((1, count), jnp.int32) if model.num_classes else None
    context = jnp.zeros((1, count, 1, model.context_dim)) if model.context_dim else None
    mask = jnp.ones((1, count, 1), bool) if model.context_dim else None
    key = numerics.key(seed)
    zero = jnp.zeros((1, count))  # as the time and the interval
    params = model.init(key, tokens, zero, layout, labels, context, mask, zero)["params"]
    if model.text is not None:
        ids, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        encoder = T5Encoder(model.text)
        params = {**params, TEXT: encoder.init(jax.random.fold_in(key, 1), ids, mask)["params"]}
    return params


@functools.lru_cache(maxsize=16)
def abstract_params(model: PixelFlow) -> dict:
    """Return the shapes and dtypes of a model's parameters, not to be changed in place."""
    return jax.eval_shape(lambda: init_params(model, 0))


def cast_params(model: PixelFlow, params: dict) -> dict:
    """Return the parameters in `model.dtype`, as its layers would convert them at each use.

    The scales of norms and the gates of cross-attention, which work in at least float32, stay, and so
    does a text encoder.
    """

    def one(path, x):
        names = [entry.key for entry in path]
        stays = names[0] == TEXT or names[-1] in ("scale", "cross_gate")
        return x if stays else x.astype(model.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def encode_text(model: PixelFlow, params: dict, condition: Condition) -> Condition:
    """Replace "text_ids" and "text_mask" by "context" and "context_mask"; return others unchanged."""
    if "text_ids" not in condition:
        return condition
    ids, mask = condition["text_ids"], condition["text_mask"]
    flat = (x.reshape(-1, x.shape[-1]) for x in (ids, mask))
    states = T5Encoder(model.text, model.dtype).apply({"params": params[TEXT]}, *flat)
    rest = {name: x for name, x in condition.items() if name not in ("text_ids", "text_mask")}
    return {**rest, "context": states.reshape(*ids.shape, -1), "context_mask": mask}
