"""The PixelFlow transformer: one network for all stages, conditioned on class labels or text.

Source: PixelFlow (arXiv 2504.07963), section 3.2, and the released code. The text model's block adds
cross-attention to the class model's. The network runs on packed rows (see cascade/packing.py).

Precision: parameters stay in `param_dtype`, float32; the residual stream and matrix products are in
`dtype`. Norms, modulation, gates and rotary embeddings run in at least float32.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pixelflow_jax.cascade.packing import PackLayout
from pixelflow_jax.common import numerics
from pixelflow_jax.common.hardware import platform_of
from pixelflow_jax.distributed.sharding import GATHERED
from pixelflow_jax.models.attention import attention, by_chunks
from pixelflow_jax.models.blockwise import SAVED
from pixelflow_jax.models.layers import (
    Dense,
    Dtype,
    RMSNorm,
    ScalarEmbedding,
    layer_norm,
    small,
    wide,
    xavier,
    zeros,
)
from pixelflow_jax.models.rope import apply_rope, rope_table

STREAM = "stream"  # the checkpoint name of a layer's input
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # but the residual stream
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # the stream, in the host
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[STREAM],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def layer_name(name: str, patch_size: int, patch_sizes: Sequence[int]) -> str:
    """Return the key, in the parameters, of the embedding or output layer of a patch size."""
    return name if patch_size == min(patch_sizes) else f"{name}_{patch_size}"


class Attention(nn.Module):
    """Multi-head attention in packed rows: self-attention, or cross-attention to `context` if given.

    q and k pass an RMSNorm over the full inner width, before the split into heads. RoPE rotates q, and k
    in self-attention. Each group of the layout attends separately.
    """

    num_heads: int
    head_dim: int
    dtype: Dtype
    param_dtype: Dtype
    platform: str
    backend: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows n d"],
        layout: PackLayout,
        rope: tuple[Float[Array, "n hd"], Float[Array, "n hd"]],
        context: Float[Array, "rows s t c"] | None = None,
        context_mask: Bool[Array, "rows s t"] | None = None,
    ) -> Float[Array, "rows n d"]:
        dense = dict(kernel_init=xavier, dtype=self.dtype, param_dtype=self.param_dtype)
        inner = self.num_heads * self.head_dim
        source = x if context is None else context

        def heads(y):
            return y.reshape(*y.shape[:-1], self.num_heads, self.head_dim)

        q = RMSNorm(self.param_dtype, name="q_norm")(Dense(inner, name="q", **dense)(x))
        dense_k, dense_v = (Dense(inner, name=name, **dense) for name in "kv")
        k_norm = RMSNorm(self.param_dtype, name="k_norm")

        def keys_and_values(y):
            return k_norm(dense_k(y)), dense_v(y)

        if context is not None and self.platform == "cpu":  # or rounding would depend on the padding
            keys_and_values = by_chunks(keys_and_values)
        k, v = map(heads, keys_and_values(source))
        q = apply_rope(heads(q), *rope)
        queries = layout.unpack(q)
        masks = [None] * len(queries)
        if context is None:
            k = apply_rope(k, *rope)
            keys, values = ([layout.whole(y) for y in layout.unpack(x)] for x in (k, v))
        else:
            keys, values = layout.split_sequences(k), layout.split_sequences(v)
            masks = layout.split_sequences(context_mask)

        def attend(*group):  # [rows, count, ...] -> [rows * count, ...] and back
            merged = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), group)
            out = attention(*merged, backend=self.backend, platform=self.platform)
            return out.reshape(*group[0].shape[:3], inner)

        out = map(attend, queries, keys, values, masks)
        return Dense(x.shape[-1], name="o", **dense)(layout.pack(list(out)))


class Block(nn.Module):
    """Self-attention, cross-attention (text models only) and MLP, modulated by the conditioning."""

    num_heads: int
    head_dim: int
    cross_attention: bool
    dtype: Dtype
    param_dtype: Dtype
    platform: str
    backend: str
    gather: Callable[[Any], Any] | None = None
    cross_gate: bool = False

    def __call__(self, *args):
        """Map x [rows, n, d], conditioning [rows, s, d], ... to (x, None), the form of nn.scan."""
        if self.gather is None:
            return self.forward(*args)

        def whole(variables):
            return {"params": self.gather(variables["params"])}

        return nn.map_variables(Block.forward, "params", trans_in_fn=whole)(self, *args)

    @nn.compact
    def forward(self, x, conditioning, layout, rope, context, context_mask):
        x = checkpoint_name(x, STREAM)
        dim, dtypes = x.shape[-1], dict(dtype=self.dtype, param_dtype=self.param_dtype)
        mod = Dense(6 * dim, kernel_init=zeros, name="modulation", **dtypes)(nn.silu(conditioning))
        mod = jnp.split(mod.astype(wide(self.dtype)), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (layout.to_tokens(m) for m in mod)

        h = (layer_norm(x) * (1 + scale1) + shift1).astype(self.dtype)
        settings = dict(num_heads=self.num_heads, head_dim=self.head_dim)
        settings |= dict(platform=self.platform, backend=self.backend)
        h = Attention(**settings, **dtypes, name="self_attention")(h, layout, rope)
        x = x + (gate1 * h).astype(self.dtype)

        if self.cross_attention:
            h = RMSNorm(self.param_dtype, name="cross_norm")(x)
            cross = Attention(**settings, **dtypes, name="cross_attention")
            h = cross(h, layout, rope, context, context_mask)
            if self.cross_gate:
                gate = self.param("cross_gate", zeros, (dim,), self.param_dtype)
                h = (gate.astype(wide(self.dtype)) * h).astype(self.dtype)
            x = x + h

        h = RMSNorm(self.param_dtype, name="mlp_norm")(x)
        h = (h.astype(wide(self.dtype)) * (1 + scale2) + shift2).astype(self.dtype)
        h = Dense(4 * dim, kernel_init=xavier, name="mlp_1", **dtypes)(h)
        h = Dense(dim, kernel_init=xavier, name="mlp_2", **dtypes)(nn.gelu(h, approximate=True))
        return x + (gate2 * h).astype(self.dtype), None


class PixelFlow(nn.Module):
    """Predicts the velocity of every token.

    Attributes:
      num_heads, head_dim, depth: the size; the width is num_heads * head_dim.
      patch_size: pixels per side of a token, or one number per stage (a cheaper last stage, beyond the
        paper), with an embedding and an output layer per size. The size embedding counts in patches of
        the smallest size.
      num_classes: classes of a class-conditional model (label num_classes is the null class), or 0.
      context_dim: width of the text states that a text model attends to, or 0.
      cross_gate: add a learned gate, initially 0, to the cross-attention; the released model has none.
      intervals: predict the average velocity over an interval of time, given its length (a student, see
        training/distillation.py). At first, the length has no effect.
      dtype, param_dtype: of computation and of parameters. With float32, products have the highest
        precision on every chip.
      text: sizes of a text encoder whose parameters are part of the model (conditioning.py), or None.
      remat: what the backward pass keeps, a key of REMAT_POLICIES.
      scan_unroll: layers per iteration of the scan over depth; more take longer to compile and run
        faster.
      attention: the attention backend, a name known to `models/attention.py` or "auto".
      platform: the target platform (`hardware.platform_of`), which decides on the attention backend
        and on how much is computed at a time; None: that of JAX's first device.
      gather_layer: gathers a layer's parameters where each device holds a part of them.
    """

    num_heads: int
    head_dim: int
    depth: int
    patch_size: int | tuple[int, ...]
    num_classes: int = 0
    context_dim: int = 0
    cross_gate: bool = False
    intervals: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    attention: str = "auto"
    platform: str | None = None
    gather_layer: Callable[[Any], Any] | None = None
    text: Any = None

    @nn.compact
    @numerics.precise
    def __call__(
        self,
        tokens: Sequence[Float[Array, "rows count length d"]],
        timesteps: Float[Array, "rows s"],
        layout: PackLayout,
        labels: Int[Array, "rows s"] | None = None,
        context: Float[Array, "rows s t c"] | None = None,
        context_mask: Bool[Array, "rows s t"] | None = None,
        interval: Float[Array, "rows s"] | None = None,
    ) -> list[Float[Array, "rows count length d"]]:
        """Return the velocity of every token, in the form of `tokens` and in at least float32.

        Raises ValueError if the model has no layers for the patch size of a group.

        Args:
          tokens: one array per group of the layout, with d = 3 * patch_size^2: patches as
            `images.patchify` orders them.
          timesteps: T in [0, 999] of every sequence.
          layout: where each sequence stands in a row.
          labels: class of every sequence, 0..num_classes; class models only.
          context, context_mask: text states, and True where they are not padding; text models only.
          interval: length of the interval of every sequence, in thousandths of its stage; models with
            `intervals` only.
        """
        dim = self.num_heads * self.head_dim
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def dense(name, p, width, init):
            name = layer_name(name, p, self.patch_sizes)
            return Dense(width, kernel_init=init, name=name, **dtypes)

        unknown = {group.patch_size for group in layout.groups} - {*self.patch_sizes}
        if unknown:
            raise ValueError(f"the model has patch sizes {self.patch_sizes}, the layout also {unknown}")
        runs = [*layout.by_patch_size(tokens)]
        embed = {p: dense("patch_embed", p, dim, xavier) for p in self.patch_sizes}
        x = jnp.concatenate([embed[p](run.pack(parts)) for p, run, parts in runs], axis=1)
        conditioning = self._conditioning(timesteps, layout, labels, interval)
        rope = map(layout.local_row, rope_table(layout.positions(self.base_patch), self.head_dim))
        rope = tuple(jnp.asarray(table, wide(self.dtype)) for table in rope)

        block = Block
        if self.remat != "none" or self.gather_layer is not None:
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        blocks = nn.scan(
            block,
            length=self.depth,
            unroll=min(self.scan_unroll, self.depth),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            check_constancy_invariants=False,  # would trace the block a second time
        )(
            self.num_heads,
            self.head_dim,
            self.context_dim > 0,
            platform=self.target,
            backend=self.attention,
            gather=self.gather_layer,
            cross_gate=self.cross_gate,
            **dtypes,
            name="blocks",
        )
        x, _ = blocks(x, conditioning, layout, rope, context, context_mask)

        mod = Dense(2 * dim, kernel_init=zeros, name="head_modulation", **dtypes)(nn.silu(conditioning))
        shift, scale = (layout.to_tokens(m) for m in jnp.split(mod.astype(wide(self.dtype)), 2, axis=-1))
        x = (layer_norm(x) * (1 + scale) + shift).astype(self.dtype)

        head = {p: dense("head", p, 3 * p * p, zeros) for p in self.patch_sizes}
        ends = np.cumsum([run.row_length // run.shards for _, run, _ in runs])[:-1]
        split = zip(runs, jnp.split(x, ends, axis=1), strict=True)
        # Conversion before slicing, so that XLA fuses it with the product
        out = [run.unpack(head[p](y).astype(wide(self.dtype))) for (p, run, _), y in split]
        return list(itertools.chain(*out))

    @property
    def target(self) -> str:
        """`platform`, or that of JAX's first device."""
        return self.platform or platform_of(jax.devices()[0])

    @property
    def patch_sizes(self) -> list[int]:
        """The distinct patch sizes, in ascending order."""
        return sorted({self.patch_size} if isinstance(self.patch_size, int) else {*self.patch_size})

    @property
    def base_patch(self) -> int:
        """The smallest patch size."""
        return self.patch_sizes[0]

    def _conditioning(self, timesteps, layout, labels, interval) -> Float[Array, "rows s d"]:
        """Return the sum of the embeddings of time, interval, grid size (mean over sides) and class."""
        dim = self.num_heads * self.head_dim
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        embedded = ScalarEmbedding(dim, **dtypes, name="time_embed")(timesteps)
        if self.intervals:
            embedded += ScalarEmbedding(dim, **dtypes, last_init=zeros, name="interval_embed")(interval)

        grids = [
            (group.height * group.patch_size, group.width * group.patch_size) for group in layout.groups
        ]
        sizes = np.array(grids, np.float32) / self.base_patch
        if (sizes[:, 0] == sizes[:, 1]).all():
            sizes = sizes[:, :1]
        each = np.repeat(np.arange(len(layout.groups)), [group.count for group in layout.groups])
        embed = ScalarEmbedding(dim, **dtypes, name="size_embed")
        embedded += embed(jnp.asarray(sizes, wide(self.dtype))).mean(axis=1)[each][None]
        if self.num_classes:
            count = self.num_classes + 1
            embed = nn.Embed(count, dim, embedding_init=small, name="class_embed", **dtypes)
            embedded += embed(labels)
        return embedded
