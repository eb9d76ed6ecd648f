"""A share of `tests/fuzz.py` on every run, and every crash that it has found."""

import pytest
from fuzz import SURFACES, fuzz

SLOW = {"checkpoint": 12, "official": 20, "config.yaml": 20}  # cases; a read or a trace each


@pytest.mark.parametrize("surface", SURFACES)
def test_fuzz(surface):
    """Catches a traceback, a hang or a stray file for absurd input."""
    counts, reports = fuzz([surface], SLOW.get(surface, 60), seed=1)
    assert not reports, "\n\n".join(reports)
    assert counts[surface]["refused"] > 0, "nothing was refused: the cases are too tame"
