"""Reading compiled programs: main memory, groups of collectives, and what a roofline makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelflow_jax.aot import hlo, roofline
from pixelflow_jax.common.hardware import CHIPS

PROGRAM = """HloModule m

%fused (param_0.1: f32[4,8,8], param_1.1: s32[]) -> f32[8,8] {
  %param_0.1 = f32[4,8,8]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.1 = f32[1,8,8]{2,1,0} dynamic-slice(%param_0.1, %param_1.1, %zero, %zero)
  ROOT %layer = f32[8,8]{1,0} bitcast(%slice.1)
}

%body (arg: (s32[], f32[8,8], f32[4,8,8])) -> (s32[], f32[8,8], f32[4,8,8]) {
  %arg = (s32[], f32[8,8], f32[4,8,8]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%arg), index=1
  %w = f32[4,8,8]{2,1,0} get-tuple-element(%arg), index=2
  %own = f32[8,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %near = f32[8,8]{1,0:T(8,128)S(1)} copy(%own)
  %dot.1 = f32[8,8]{1,0} dot(%x, %near), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,8], f32[4,8,8]) tuple(%i, %dot.1, %w)
}

%condition (arg.1: (s32[], f32[8,8], f32[4,8,8])) -> pred[] {
  %arg.1 = (s32[], f32[8,8], f32[4,8,8]) parameter(0)
  %n = s32[] constant(4)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[8,8], f32[4,8,8])) -> f32[8,8] {
  %p = (s32[], f32[8,8], f32[4,8,8]) parameter(0)
  %loop = (s32[], f32[8,8], f32[4,8,8]) while(%p), condition=%condition, body=%body
  %got = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %part = ((f32[8,8]{1,0}), f32[2,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%got)
  ROOT %sum = f32[8,8]{1,0} all-reduce(%got), replica_groups=[2,4]<=[4,2]T(1,0)
}
"""


def test_bytes_of_main_memory():
    """Catches loops that count once, slices that count whole, and on-chip arrays that count at all."""
    array, item = 8 * 8 * 4, 4
    layer = 2 * array + item  # the slice read and written, and its index
    near = array  # the copy reads; it writes on the chip
    dot = 2 * array  # reads x, writes; the other operand is on the chip
    part = 2 * 8 * 4  # read; it is written on the chip
    assert hlo.hbm_bytes(PROGRAM) == 4 * (layer + near + dot) + part + 2 * array


def test_groups_of_a_collective():
    """Catches a sum between slices that counts as one inside a slice."""
    (found,) = hlo.collectives(PROGRAM)
    assert found.group == (0, 2, 4, 6)
    inside = roofline.moved_bytes([found], [0] * 8)
    between = roofline.moved_bytes([found], [0, 0, 0, 0, 1, 1, 1, 1])
    assert inside == {"ici": 2 * 256 * 3 / 4, "dcn": 0}
    assert between == {"ici": 0, "dcn": 2 * 256 * 3 / 4}


def test_bytes_of_a_real_program():
    """Catches text of the present XLA that the reader does not understand: a product of two matrices."""
    x = jnp.ones((256, 256))
    text = jax.jit(jnp.matmul).lower(x, x).compile().as_text()
    assert hlo.hbm_bytes(text) == pytest.approx(3 * x.nbytes, rel=0.01)


def test_the_slowest_part_bounds_the_step():
    """Catches a projection that adds where it should overlap, or an MFU over the wrong work."""
    chip = CHIPS["v5e"]
    found = roofline.project(
        chip, 4, 2 * chip.flops, chip.flops, chip.hbm_bandwidth / 2, dict(ici=0, dcn=0)
    )
    assert found["bound"] == "compute" and found["step_seconds"] == 1
    np.testing.assert_allclose(found["step_seconds_one_after_the_other"], 1.5)
    np.testing.assert_allclose([found["mfu"], found["mfu_one_after_the_other"]], [0.5, 1 / 3])
