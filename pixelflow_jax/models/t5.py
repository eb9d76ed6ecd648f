"""T5 encoder, version 1.1 (gated GELU): Flan-T5 small to XXL, or a small one trained with the model.

Source: Raffel et al., arXiv 1910.10683; Shazeer, arXiv 2002.05202 (the gated MLP). Names of weights and
config keys follow the public checkpoints (transformers' T5EncoderModel).

Precision: the residual stream and matrix products are in `dtype`; norms and the softmax run in at least
float32. There is no dropout.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pixelflow_jax.common import UserError, numerics
from pixelflow_jax.models.layers import Dtype, RMSNorm, wide
from pixelflow_jax.models.public import Names, public_params

SPECIAL = ("<pad>", "</s>", "<unk>")  # the first entries of every vocabulary


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The sizes of an encoder, named as in its config.json.

    Attributes:
      d_model, d_kv, d_ff: the width of the states, of a head, and of the MLP's hidden layer.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "T5Config":
        """Return the config from `values`, the contents of the config.json at `where`.

        Raises UserError if a size is missing, or the encoder is not a T5 of version 1.1.
        """
        kind = values.get("feed_forward_proj")
        if kind != "gated-gelu":
            raise UserError(
                f"{where}: feed_forward_proj is {kind!r}; only T5 version 1.1 (Flan-T5, t5-v1_1, mT5), "
                f"with 'gated-gelu', is supported"
            )
        found = {}
        for field in dataclasses.fields(cls):
            value = values.get(field.name, field.default)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise UserError(f"{where}: {field.name} is missing or not a positive number")
            found[field.name] = value
        if found["layer_norm_epsilon"] != cls.layer_norm_epsilon:
            raise UserError(f"{where}: layer_norm_epsilon must be 1e-6")
        return cls(**found)


def relative_buckets(
    length: int, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "length length"]:
    """Return the bucket of each (query, key) pair: exact for near keys, logarithmic for far ones.

    Half of the buckets are for keys after the query. Source: arXiv 1910.10683, section 2.1; logarithms
    in float32, as in the public code.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    far = np.abs(distance)
    with np.errstate(divide="ignore"):
        ratio = np.log(far.astype(np.float32) / np.float32(exact))
    ratio /= np.float32(np.log(max_distance / exact))
    large = exact + np.where(far < exact, 0, ratio * np.float32(half - exact)).astype(np.int64)
    return np.where(distance > 0, half, 0) + np.where(far < exact, far, np.minimum(large, half - 1))


class T5Layer(nn.Module):
    """Self-attention with a shared position bias, then the gated MLP; an RMSNorm precedes each."""

    config: T5Config
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x, bias):
        """Map x [b, t, d] and bias [b, heads, t, t] (positions, mask) to (x, None) for nn.scan."""
        c = self.config

        def dense(features, std, name):
            init = nn.initializers.normal(std)
            dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
            return nn.Dense(features, use_bias=False, kernel_init=init, name=name, **dtypes)

        inner, width = c.num_heads * c.d_kv, c.d_model**-0.5
        h = RMSNorm(self.param_dtype, name="attention_norm")(x)
        q = dense(inner, (c.d_model * c.d_kv) ** -0.5, "q")(h)  # T5 does not divide scores by sqrt(d_kv)
        k, v = dense(inner, width, "k")(h), dense(inner, width, "v")(h)
        q, k, v = (y.reshape(*y.shape[:-1], c.num_heads, c.d_kv) for y in (q, k, v))
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=wide(self.dtype))
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(*x.shape[:-1], inner)
        x = x + dense(c.d_model, inner**-0.5, "o")(mixed)

        h = RMSNorm(self.param_dtype, name="mlp_norm")(x)
        gate = nn.gelu(dense(c.d_ff, width, "wi_0")(h), approximate=True)
        h = gate * dense(c.d_ff, width, "wi_1")(h)
        return x + dense(c.d_model, c.d_ff**-0.5, "wo")(h), None


class T5Encoder(nn.Module):
    """Encodes token ids into states. Padding is masked."""

    config: T5Config
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    @numerics.precise
    def __call__(self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        """Return a state per token; states where mask is False are undefined."""
        c, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        embed = nn.Embed(
            c.vocab_size, c.d_model, embedding_init=nn.initializers.normal(1.0), name="embed", **dtypes
        )
        table = self.param(
            "relative_bias",
            nn.initializers.normal(1.0),  # with T5's d_model^-0.5 a small encoder learns order slowly
            (c.relative_attention_num_buckets, c.num_heads),
            self.param_dtype,
        )
        buckets = relative_buckets(
            ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        bias = jnp.moveaxis(table.astype(wide(self.dtype))[buckets], -1, 0)[None]
        bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(jnp.float32).min)
        layers = nn.scan(
            T5Layer,
            length=c.num_layers,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            check_constancy_invariants=False,
        )(c, name="blocks", **dtypes)
        x, _ = layers(embed(ids), bias)
        return RMSNorm(self.param_dtype, name="final_norm")(x)


LAYER_NAMES = {  # ours: the name within encoder.block.<i>.layer
    **{(name, "kernel"): f"0.SelfAttention.{name}.weight" for name in "qkvo"},
    ("attention_norm", "scale"): "0.layer_norm.weight",
    **{(name, "kernel"): f"1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1", "wo")},
    ("mlp_norm", "scale"): "1.layer_norm.weight",
}
BIAS_NAME = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
EMBED_NAMES = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one array


def weight_names(config: T5Config) -> Names:
    """Return (our path, layer or None, public name) of every array."""
    outer = [
        (("embed", "embedding"), None, EMBED_NAMES[0]),
        (("relative_bias",), None, BIAS_NAME),
        (("final_norm", "scale"), None, "encoder.final_layer_norm.weight"),
    ]
    layers = [
        (("blocks", *ours), i, f"encoder.block.{i}.layer.{public}")
        for ours, public in LAYER_NAMES.items()
        for i in range(config.num_layers)
    ]
    return outer + layers


def known_names(config: T5Config) -> set[str]:
    """Return the public names that arrays of the encoder may have."""
    return {name for _, _, name in weight_names(config)} | {*EMBED_NAMES}


def t5_params(read, names: Iterable[str], config: T5Config, where: str, dtype=np.float32) -> dict:
    """Return our parameters from a public checkpoint, which may hold a decoder.

    `where` is the file or folder, for errors; for the rest, and for errors, see `public_params`.
    """
    names = {name for name in names if not name.startswith(("decoder.", "lm_head."))}
    there = names - {*EMBED_NAMES} | ({EMBED_NAMES[0]} if names & {*EMBED_NAMES} else set())
    ids, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    shapes = jax.eval_shape(lambda: T5Encoder(config).init(numerics.key(0), ids, mask))["params"]

    def read_either(name):
        return read(name if name in names else EMBED_NAMES[1])

    errors = f"{where} does not fit its config.json", "config.json says"
    return public_params(read_either, there, weight_names(config), shapes, *errors, dtype=dtype)
