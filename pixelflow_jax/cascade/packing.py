"""Packing: sequences of several sizes side by side in one row of tokens, with a static layout.

A row holds groups; a group holds `count` sequences of one token grid. Linear layers see the whole
row; attention slices a group out and sees [rows * count, length]: no mask, no padding.
Arrays are [rows, ...]: a row is what one device works on, so the first axis is what gets sharded.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

CONTEXT = "context"  # the mesh axis of devices that share sequences
# A packed row; or a list of them, one for each of a layout's `runs`, where tokens have several sizes
Rows = Array | list[Array]


@dataclasses.dataclass(frozen=True)
class Group:
    """`count` sequences whose tokens stand on a `height` x `width` grid.

    `scale` is the side of a token in patches of the smallest size, where stages have several.
    """

    count: int
    height: int
    width: int
    scale: int = 1

    @property
    def length(self) -> int:
        """Tokens in one sequence."""
        return self.height * self.width


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PackLayout:
    """Which sequences stand where in a packed row. Hashable, so it can be a static argument.

    With `shards` above 1, that many devices along the mesh's axis CONTEXT share a row: each holds an
    equal part of every sequence, and `pack`, `unpack` and `to_tokens` are about that part.
    """

    groups: tuple[Group, ...]
    shards: int = 1

    @property
    def num_groups(self) -> int:
        """Groups in a row."""
        return len(self.groups)

    @property
    def num_sequences(self) -> int:
        """Sequences in a row."""
        return sum(group.count for group in self.groups)

    @property
    def row_length(self) -> int:
        """Tokens in a whole row."""
        return sum(group.count * group.length for group in self.groups)

    @property
    def num_tokens(self) -> int:
        """Tokens of a row that a device holds."""
        return self.row_length // self.shards

    def local_length(self, group: Group) -> int:
        """Tokens of one sequence that a device holds."""
        return group.length // self.shards

    def pack(self, parts: Sequence[Shaped[Array, "rows count length d"]]) -> Shaped[Array, "rows n d"]:
        """Joins one array per group, in the order of `groups`, into rows."""
        flat = [
            part.reshape(part.shape[0], group.count * self.local_length(group), part.shape[-1])
            for group, part in zip(self.groups, parts, strict=True)
        ]
        return jnp.concatenate(flat, axis=1)

    def unpack(self, row: Shaped[Array, "rows n ..."]) -> list[Shaped[Array, "rows count length ..."]]:
        """The inverse of `pack`: one [rows, count, length, ...] per group (static slices)."""
        parts, begin = [], 0
        for group in self.groups:
            length = self.local_length(group)
            end = begin + group.count * length
            part = row[:, begin:end]
            parts.append(part.reshape(row.shape[0], group.count, length, *row.shape[2:]))
            begin = end
        return parts

    def runs(self) -> list["PackLayout"]:
        """Layouts of the neighbouring groups whose tokens have the same size; mostly one, of all."""
        kinds = itertools.groupby(self.groups, key=lambda group: group.scale)
        return [PackLayout(tuple(groups), self.shards) for _, groups in kinds]

    def local(self, row: Shaped[Array, "*rows n d"]) -> Shaped[Array, "*rows n2 d"]:
        """Of a whole row, the part that this device holds."""
        if self.shards == 1:
            return row
        parts, begin, place = [], 0, jax.lax.axis_index(CONTEXT)
        for group in self.groups:
            end = begin + group.count * group.length
            shape = (group.count, self.shards, self.local_length(group), row.shape[-1])
            part = row[..., begin:end, :].reshape(*row.shape[:-2], *shape)
            part = jax.lax.dynamic_index_in_dim(part, place, part.ndim - 3, keepdims=False)
            parts.append(part.reshape(*row.shape[:-2], -1, row.shape[-1]))
            begin = end
        return jnp.concatenate(parts, axis=-2)

    def whole(self, part: Shaped[Array, "rows count n ..."]) -> Shaped[Array, "rows count length ..."]:
        """A group's sequences from the parts of all devices that share them."""
        return part if self.shards == 1 else jax.lax.all_gather(part, CONTEXT, axis=2, tiled=True)

    def split_sequences(self, x: Shaped[Array, "rows s ..."]) -> list[Shaped[Array, "rows count ..."]]:
        """Cuts an array with one entry per sequence into one array per group."""
        ends = np.cumsum([group.count for group in self.groups])[:-1]
        return jnp.split(x, ends, axis=1)

    def to_tokens(self, x: Shaped[Array, "rows s d"]) -> Shaped[Array, "rows n d"]:
        """Repeats each sequence's vector for every token of that sequence."""
        return self.pack(
            [
                jnp.broadcast_to(
                    part[:, :, None], (*part.shape[:2], self.local_length(group), part.shape[-1])
                )
                for group, part in zip(self.groups, self.split_sequences(x), strict=True)
            ]
        )

    def sequence_means(self, row: Float[Array, "rows n d"]) -> Float[Array, "rows s"]:
        """Mean over each sequence's own tokens and features; with shards, this device's share of it."""
        return jnp.concatenate(
            [part.mean(axis=(2, 3)) / self.shards for part in self.unpack(row)], axis=1
        )

    def positions(self) -> Int[np.ndarray, "n 2"]:
        """(row, column) of every token in its own grid, from 0."""
        grids = [np.indices((group.height, group.width)).reshape(2, -1).T for group in self.groups]
        return np.concatenate(
            [np.tile(grid, (group.count, 1)) for group, grid in zip(self.groups, grids, strict=True)]
        )


def map_runs(function: Callable[..., Array], layout: PackLayout, *rows: Rows) -> Rows:
    """`function(run, row, ...)` for each run of a layout; a list where there are several."""
    split = [x if isinstance(x, (list, tuple)) else [x] for x in rows]
    out = [function(*args) for args in zip(layout.runs(), *split, strict=True)]
    return out[0] if len(out) == 1 else out


def join_runs(rows: Rows, axis: int = 1) -> Array:
    """One array from those of all runs."""
    return jnp.concatenate(rows, axis=axis) if isinstance(rows, (list, tuple)) else rows
