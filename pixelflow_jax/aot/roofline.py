"""How fast a compiled program could run on a chip: the least time for its work, part by part.

Nothing here is measured. Each part assumes the chip's published peak (hardware.py).
"""

from collections.abc import Sequence
from typing import Any

from pixelflow_jax.aot.hlo import Collective
from pixelflow_jax.common.hardware import Chip

ASSUMPTIONS = (
    "compute: products at the chip's bfloat16 peak, widths rounded up to 128 lanes",
    "hbm: what each fusion and kernel reads and writes, once, at the published bandwidth",
    "ici: a gather or reduce-scatter brings each chip the whole array once, a sum twice, over all links",
    "dcn: a sum between slices moves each chip's share twice over its part of the host's network",
    "step: all four overlap (the best case); 'one after the other' is their sum",
)
TRANSFERS = {"all-reduce": 2}  # of the whole array, a chip; the others 1


def moved_bytes(found: Sequence[Collective], slices: Sequence[int]) -> dict[str, float]:
    """Bytes a chip sends or receives in a step, inside its slice ("ici") and between slices ("dcn").

    Args:
      found: the program's collectives.
      slices: the slice of every device, in the order of the mesh.
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
    chip: Chip, devices: int, model_flops: float, lane_flops: float, hbm: float, moved: dict[str, float]
) -> dict[str, Any]:
    """Seconds of a step and what they mean. A projection.

    Args:
      chip: what it runs on.
      devices: how many.
      model_flops: what the step needs in all, by the shapes of the model (models/flops.py).
      lane_flops: what each device does, recomputed work and rounding to lanes included.
      hbm: bytes each device moves to and from its memory.
      moved: of `moved_bytes`.
    """
    parts = {
        "compute": lane_flops / chip.flops,
        "hbm": hbm / chip.hbm_bandwidth,
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
