"""Compiled programs: their collectives, and the projection from them."""

import numpy as np

from pixelflow_jax.aot import hlo, projection
from pixelflow_jax.common.hardware import CHIPS

PROGRAM = """HloModule m

%body (arg: (s32[], f32[8,8], f32[4,8,8])) -> (s32[], f32[8,8], f32[4,8,8]) {
  %arg = (s32[], f32[8,8], f32[4,8,8]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%arg), index=1
  %w = f32[4,8,8]{2,1,0} get-tuple-element(%arg), index=2
  %start = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  %own = f32[8,8]{1,0} all-gather-done(%start)
  ROOT %out = (s32[], f32[8,8], f32[4,8,8]) tuple(%i, %own, %w)
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
  ROOT %sum = f32[8,8]{1,0} all-reduce(%got), replica_groups=[2,4]<=[4,2]T(1,0)
}
"""
ARRAY = 8 * 8 * 4


def test_collectives_in_loops():
    """Catches a loop body that counts once, and an asynchronous gather that counts its operand too."""
    gather, _ = hlo.collectives(PROGRAM)
    assert (gather.times, gather.bytes, gather.group) == (4, ARRAY, (0, 1, 2, 3))
    totals = hlo.summary([gather])
    assert totals["all-gather"] == {"ops": 1, "runs": 4, "bytes": 4 * ARRAY}
    assert totals["all-reduce"]["ops"] == 0


def test_groups_of_a_collective():
    """Catches a sum between slices that counts as one inside a slice."""
    _, found = hlo.collectives(PROGRAM)
    assert found.group == (0, 2, 4, 6)
    inside = projection.moved_bytes([found], [0] * 8)
    between = projection.moved_bytes([found], [0, 0, 0, 0, 1, 1, 1, 1])
    assert inside == {"ici": 2 * ARRAY * 3 / 4, "dcn": 0}
    assert between == {"ici": 0, "dcn": 2 * ARRAY * 3 / 4}


def test_the_slowest_part_bounds_the_step():
    """Catches a projection that adds where it should overlap, or an MFU over the wrong work."""
    chip = CHIPS["v5e"]
    moved = {"ici": chip.ici_bandwidth / 2, "dcn": chip.dcn_bandwidth / 4}
    found = projection.project(chip, 4, 2 * chip.flops, chip.flops, moved)
    assert found["seconds"] == {"compute": 1, "ici": 0.5, "dcn": 0.25}
    assert found["bound"] == "compute" and found["step_seconds"] == 1
    np.testing.assert_allclose(found["step_seconds_one_after_the_other"], 1.75)
    np.testing.assert_allclose([found["mfu"], found["mfu_one_after_the_other"]], [0.5, 0.5 / 1.75])
