"""Packing: sequences of several sizes side by side in one row of tokens, with a static layout.

A row holds groups; a group holds `count` sequences that share one token grid. Linear layers see the
whole row. Attention slices out one group at a time and sees [rows * count, length]: no mask, no padding.
Arrays are [rows, ...]. Each device works on its own rows, so the first axis is the one to shard.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from pixelflow_jax.cascade.stages import Cascade

CONTEXT = "context"  # the mesh axis of devices that share sequences


@dataclasses.dataclass(frozen=True)
class Group:
    """`count` sequences on a `height` x `width` grid of tokens of `patch_size` x `patch_size` pixels."""

    count: int
    height: int
    width: int
    patch_size: int = 1

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.height * self.width


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PackLayout:
    """The position of each sequence in a packed row. Hashable, so it can be a static argument.

    With `shards` above 1, that many devices along the mesh axis CONTEXT share a row: each holds an equal
    part of every sequence, and `pack`, `unpack` and `to_tokens` operate on that part.
    """

    groups: tuple[Group, ...]
    shards: int = 1

    @property
    def num_sequences(self) -> int:
        """Sequences per row."""
        return sum(group.count for group in self.groups)

    @property
    def row_length(self) -> int:
        """Tokens per row, over all devices that share it."""
        return sum(group.count * group.length for group in self.groups)

    def pack(self, parts: Sequence[Shaped[Array, "rows count length d"]]) -> Shaped[Array, "rows n d"]:
        """Join one array per group, in the order of `groups`, into rows."""
        flat = [
            part.reshape(len(part), group.count * group.length // self.shards, -1)
            for group, part in zip(self.groups, parts, strict=True)
        ]
        return jnp.concatenate(flat, axis=1)

    def unpack(self, row: Shaped[Array, "rows n ..."]) -> list[Shaped[Array, "rows count length ..."]]:
        """Return one [rows, count, length, ...] per group, by static slices; the inverse of `pack`."""
        lengths = [group.length // self.shards for group in self.groups]
        ends = np.cumsum([group.count * n for group, n in zip(self.groups, lengths, strict=True)])[:-1]
        parts = zip(self.groups, lengths, jnp.split(row, ends, axis=1), strict=True)
        return [x.reshape(len(x), group.count, n, *x.shape[2:]) for group, n, x in parts]

    def by_patch_size(self, parts: Sequence[Array]) -> Iterator[tuple[int, "PackLayout", list[Array]]]:
        """Yield (patch size, layout, parts) for each run of neighboring groups of one patch size."""
        pairs = zip(self.groups, parts, strict=True)
        for patch_size, run in itertools.groupby(pairs, key=lambda pair: pair[0].patch_size):
            groups, own = zip(*run, strict=True)
            yield patch_size, PackLayout(groups, self.shards), list(own)

    def local(self, part: Shaped[Array, "*b length d"]) -> Shaped[Array, "*b n d"]:
        """Return this device's part of a group's sequences."""
        if self.shards == 1:
            return part
        parts = part.reshape(*part.shape[:-2], self.shards, -1, part.shape[-1])
        place, axis = jax.lax.axis_index(CONTEXT), parts.ndim - 3
        return jax.lax.dynamic_index_in_dim(parts, place, axis, keepdims=False)

    def local_row(self, row: Shaped[Array, "n d"]) -> Shaped[Array, "n2 d"]:
        """Return this device's part of a whole row."""
        if self.shards == 1:
            return row
        return self.pack([self.local(part) for part in PackLayout(self.groups).unpack(row[None])])[0]

    def whole(self, part: Shaped[Array, "rows count n ..."]) -> Shaped[Array, "rows count length ..."]:
        """Gather a group's sequences from all devices that share them."""
        return part if self.shards == 1 else jax.lax.all_gather(part, CONTEXT, axis=2, tiled=True)

    def split_sequences(self, x: Shaped[Array, "rows s ..."]) -> list[Shaped[Array, "rows count ..."]]:
        """Split an array with one entry per sequence into one array per group."""
        ends = np.cumsum([group.count for group in self.groups])[:-1]
        return jnp.split(x, ends, axis=1)

    def to_tokens(self, x: Shaped[Array, "rows s d"]) -> Shaped[Array, "rows n d"]:
        """Repeat each sequence's vector for every token of that sequence."""
        parts = []
        for group, part in zip(self.groups, self.split_sequences(x), strict=True):
            shape = (*part.shape[:2], group.length // self.shards, part.shape[-1])
            parts.append(jnp.broadcast_to(part[:, :, None], shape))
        return self.pack(parts)

    def positions(self, unit: int = 1) -> Float[np.ndarray, "n 2"]:
        """Return the (row, column) of the middle of every token of a whole row, from 0.

        They count patches of `unit` pixels per side, the middle of the first of which is at 0.
        """
        grids = []
        for group in self.groups:
            grid = np.indices((group.height, group.width)).reshape(2, -1).T
            times = group.patch_size / unit
            grids.append(np.tile(grid * times + (times - 1) / 2, (group.count, 1)))
        return np.concatenate(grids)


def cascade_layout(
    cascade: Cascade,
    counts: dict[int, int],
    height: int,
    width: int,
    patch_size: int | Sequence[int],
    shards: int = 1,
) -> PackLayout:
    """Return the layout of a row with counts[s] images at stage s; height and width in pixels.

    Raises UserError if the patches do not fill the images of every stage.
    """
    cascade.check_size(height, width, patch_size)
    groups = []
    for stage, count in counts.items():
        (h, w), p = cascade.size(stage, height, width), cascade.patches(patch_size)[stage]
        groups.append(Group(count, h // p, w // p, p))
    return PackLayout(tuple(groups), shards)
