"""benchmarks/accelerator.py: every part runs, tiny, on the CPU; what fails is told and ends nothing."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def run(out, *flags, **more):
    """(exit code, lines, tables) of a rehearsal."""
    command = [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), "--rehearse", f"--out={out}"]
    done = subprocess.run(
        [*command, *flags], env={**os.environ, **more}, capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done.returncode, lines, (out / "results.md").read_text()


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Catches a part that would fail on the accelerator for want of a name, an argument or a package."""
    card = tmp_path / "card"
    card.mkdir()
    images = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8)
    np.savez(card / "emoji.npz", images=images, captions=[f"red {n}" for n in range(12)])
    code, lines, text = run(tmp_path / "out", f"--card={card}", "--minutes=30")
    assert code == 0 and not [line for line in lines if "error" in line], lines
    assert {line["part"] for line in lines} == set(
        "correct train switches sample official pictures".split()
    )
    left = [line for line in lines if "note" in line]
    assert all("not run" in line["note"] for line in left)
    assert [line["part"] for line in left] == 3 * ["switches"] + 3 * ["official"] + ["pictures"]
    timed = [line for line in lines if line["part"] in ("train", "switches", "sample")]
    timed = [line for line in timed if line not in left]
    assert len(timed) == 22 and all(line["images/s"] > 0 and line["TFLOP/s"] > 0 for line in timed)
    assert (tmp_path / "out" / "emoji.png").exists()
    assert (tmp_path / "out" / "emoji.safetensors").stat().st_size < 16 << 20
    assert text.count("\n## ") == 6


@pytest.mark.slow
def test_what_is_wrong_is_told(tmp_path):
    """Catches a case over its bound that passes, and a failure that ends the other measurements."""
    cases, name = tmp_path / "cases", "schedule_2stages.npz"
    cases.mkdir()
    with np.load(ROOT / "tests" / "data" / "parity" / name) as held:
        changed = {key: held[key] + (0.1 if key == "end_t" else 0) for key in held.files}
    np.savez(cases / name, **changed)
    flags = ["correct", f"--card={tmp_path}"]
    code, lines, text = run(tmp_path / "out", *flags, PIXELFLOW_PARITY_CASES=str(cases))
    assert code == 1 and len(lines) == 3
    assert "schedule_2stages" in lines[0]["wrong"][0] and "schedule_2stages" in text
