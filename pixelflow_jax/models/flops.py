"""Count the floating-point operations of a model, from its shapes or from a traced function."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from pixelflow_jax.cascade.packing import PackLayout
from pixelflow_jax.models.layers import SINCOS_DIM
from pixelflow_jax.models.transformer import PixelFlow


def forward_flops(model: PixelFlow, layout: PackLayout, context_length: int = 0) -> int:
    """Return the FLOPs of the matrix products in one forward pass over one row.

    A multiply-add counts as two. Norms, gates and rotations are left out, as in the definition of MFU
    (PaLM, arXiv 2204.02311, appendix B). Training costs three times as much.
    """
    dim, tokens, sequences = model.num_heads * model.head_dim, layout.row_length, layout.num_sequences
    layer = 2 * tokens * (4 + 8) * dim * dim  # q, k, v, o; two in the MLP
    layer += sum(4 * group.count * group.length**2 * dim for group in layout.groups)  # attention
    layer += 2 * sequences * 6 * dim * dim
    if model.context_dim:
        text = sequences * context_length
        cross = sum(2 * g.count * g.length * context_length * dim for g in layout.groups)
        layer += 2 * (tokens * 2 * dim * dim + text * 2 * model.context_dim * dim + cross)
    sides = sum(1 if group.height == group.width else 2 for group in layout.groups)
    numbers = sequences * (1 + model.intervals) + sides  # times, lengths of intervals, sizes
    embeddings = numbers * (SINCOS_DIM + dim) * dim
    ends = sum(2 * g.count * g.length * 3 * g.patch_size**2 for g in layout.groups)
    ends = (ends + sequences * 2 * dim) * dim
    return model.depth * layer + 2 * (embeddings + ends)


def traced_flops(function: Callable, *args: Any, lanes: int = 1) -> int:
    """Return the FLOPs of the matrix products that a function runs, counted from its trace.

    Loop bodies count once per iteration, Pallas kernels once per grid point, and recomputation in a
    backward pass as often as it happens. Unused results are left out, as by the compiler. Inside
    shard_map, the count is one device's share. XLA's own cost_analysis counts loop bodies once and
    kernels not at all. Raises ValueError if a product is inside a loop of unknown length.

    Args:
      function, args: as for jax.make_jaxpr; arrays may be abstract.
      lanes: lanes of the matrix unit. The inner and outer widths of a product are rounded up to a
        multiple, as in hardware; 1 counts the arithmetic alone.
    """
    return program_flops(jax.make_jaxpr(function)(*args).jaxpr, lanes)


def program_flops(jaxpr: core.Jaxpr, lanes: int = 1) -> int:
    """Return `traced_flops` of a traced program."""
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(jaxpr, lanes)


def _count(jaxpr: core.Jaxpr, lanes: int) -> int:
    return sum(_count_equation(equation, lanes) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn, lanes: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation, lanes)
    inner = [_count(jaxpr, lanes) for jaxpr in _jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "while" and sum(inner):
        raise ValueError("a matrix product is inside a while loop, whose length is unknown")
    if name == "cond":
        return max(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    return sum(inner)


def _product(equation: core.JaxprEqn, lanes: int) -> int:
    """Return 2 x batch x rows x columns x inner."""
    (left_inner, right_inner), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (var.aval.shape for var in equation.invars)

    def rounded(size):
        return -(-size // lanes) * lanes

    inner = rounded(math.prod(left[axis] for axis in left_inner))
    batch = math.prod(left[axis] for axis in left_batch)
    rows = math.prod(n for axis, n in enumerate(left) if axis not in (*left_inner, *left_batch))
    columns = math.prod(n for axis, n in enumerate(right) if axis not in (*right_inner, *right_batch))
    return 2 * batch * rows * rounded(columns) * inner


def _jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Return the programs among an equation's parameters."""
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, kinds))
    return [getattr(x, "jaxpr", x) for x in leaves if isinstance(x, kinds)]
