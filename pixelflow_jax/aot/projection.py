"""Lower bounds on a compiled program's step time on a chip, from compute and interconnect alone.

Nothing here is measured. Each part assumes the chip's published peak (common/hardware.py). Traffic to
the chip's own memory is left out: a program that is bound by it takes longer.
"""

from collections.abc import Sequence
from typing import Any

from pixelflow_jax.aot.hlo import Collective
from pixelflow_jax.common.hardware import Chip

ASSUMPTIONS = (
    "compute: matrix products at the chip's bfloat16 peak, widths rounded up to 128 lanes",
    "ici: a gather or reduce-scatter moves the whole array once per chip, a sum twice, over all links",
    "dcn: a sum between slices moves each chip's share twice over its part of the host's network",
    "step: a lower bound, as memory traffic is left out; the best case is full overlap, the other none",
)
TRANSFERS = {"all-reduce": 2}  # times that a chip moves the whole array; 1 for other kinds


def moved_bytes(found: Sequence[Collective], slices: Sequence[int]) -> dict[str, float]:
    """Return the bytes that a chip moves per step, inside its slice ("ici") and between slices ("dcn").

    `slices` has the slice of every device, in the order of the mesh.
    """
    moved = {"ici": 0.0, "dcn": 0.0}
    for one in found:
        size = max(len(one.group), 1)
        share = (size - 1) / size if one.group else 1.0
        amount = one.times * one.bytes * TRANSFERS.get(one.kind, 1) * share
        crosses = len({slices[place] for place in one.group}) > 1
        moved["dcn" if crosses else "ici"] += amount
    return moved


def project(
    chip: Chip, devices: int, model_flops: float, lane_flops: float, moved: dict[str, float]
) -> dict[str, Any]:
    """Return lower bounds on the seconds per step, and the upper bounds on MFU that follow.

    `model_flops` is the work of the whole step by the model's shapes (models/flops.py), `lane_flops`
    that of each device, with recomputation and rounding to lanes; `moved` is from `moved_bytes`.
    """
    parts = {
        "compute": lane_flops / chip.flops,
        "ici": moved["ici"] / chip.ici_bandwidth,
        "dcn": moved["dcn"] / chip.dcn_bandwidth,
    }
    best, worst = max(parts.values()), sum(parts.values())
    useful = model_flops / (devices * chip.flops)
    return {
        "seconds": parts,
        "bound": max(parts, key=parts.get),
        "step_seconds": best,
        "step_seconds_one_after_the_other": worst,
        "mfu": useful / best,
        "mfu_one_after_the_other": useful / worst,
        "assumptions": list(ASSUMPTIONS),
    }
