"""Parity with the official implementation on recorded cases; see parity.py and docs/parity.md."""

import pytest

import parity

CASES = sorted(parity.cases_folder().glob("*.npz"))


def test_there_are_cases():
    """Catches a wrong PIXELFLOW_PARITY_CASES, which would otherwise pass by running nothing."""
    assert any(parity.runner(path) for path in CASES), parity.cases_folder()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path):
    """Catches any change of what is computed: schedules, network, loss, optimizer, sampler."""
    if parity.runner(path) is None:
        pytest.skip("not covered: this version has no such part yet")
    errors = parity.run_case(path)
    over = {what: (error, bound) for what, (error, bound) in errors.items() if not error <= bound}
    assert errors and not over
