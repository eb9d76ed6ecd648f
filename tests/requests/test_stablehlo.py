"""The sampler as StableHLO: what runs without this package, and on which platforms."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import pixelflow_jax as pf
from pixelflow_jax import convert
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.text.tokenizer import word_tokenizer
from pixelflow_jax.training.checkpoints import save_params

from conftest import TINY, calm

TEXT = ["model.num_heads=2", "model.head_dim=8", "model.depth=2", "model.context_dim=16"]
CALLER = """
import sys
for name in list(sys.modules):
    assert not name.startswith(("pixelflow_jax", "flax")), name
import jax, numpy as np
folder = sys.argv[1]
program = jax.export.deserialize(bytearray(open(folder + "/sampler_cpu.bin", "rb").read()))
params = dict(np.load(folder + "/params.npz"))
given = [np.load(folder + "/given.npz")[name] for name in sys.argv[2:]]
np.save(folder + "/pixels.npy", np.asarray(program.call(params, *given)))
assert "pixelflow_jax" not in sys.modules and "flax" not in sys.modules
"""


def called(folder, **given):
    """Return the pixels of a program in another process, which does not know this package."""
    np.savez(folder / "given.npz", **given)
    command = [sys.executable, "-P", "-c", CALLER, str(folder), *given]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "pixels.npy")


@pytest.mark.parametrize("kind", ["classes", "text"])
def test_jax_alone_gives_the_same_pixels(kind, tmp_path):
    """Catches a program that needs this package, or draws other pixels than the sampler."""
    config = load_config("digits", TINY) if kind == "classes" else load_config("t2i_tiny", TEXT)
    save_params(tmp_path / "run", calm(build_model(config)), config)
    out, flags = tmp_path / "out", ["--batch_size=4", "--num_steps=3", "--solver=ab2"]
    convert.main([f"--source={tmp_path / 'run'}", "--to=stablehlo", f"--out={out}", *flags])
    seed, number = np.full(4, 7, np.uint32), np.arange(4, dtype=np.int32)
    asked = dict(seed=7, num_images=4, batch_size=4, num_steps=3, solver="ab2")
    if kind == "classes":
        pixels = called(out, seed=seed, number=number, labels=np.array([3, 1, 4, 1], np.int32))
        expected = pf.load(tmp_path / "run").sample(labels=[3, 1, 4, 1], **asked)
    else:
        prompts = ["a red six", "two"]
        words = json.loads((out / "settings.json").read_text())["words"]
        tokens = word_tokenizer(words)(prompts * 2, config.text.max_length)
        pixels = called(out, seed=seed, number=number, ids=tokens.ids, mask=tokens.mask)
        expected = pf.load(tmp_path / "run").sample(prompt=prompts, **asked)
    np.testing.assert_array_equal(pixels, expected)
    readme = (out / "README.md").read_text()
    assert f"jax {jax.__version__}" in readme and len(readme.splitlines()) <= 12
    lines = [line.strip() for line in readme.splitlines() if line.startswith("    ")]
    done = subprocess.run([sys.executable, "-P", "-c", "\n".join(lines)], cwd=out, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_other_platforms_lower(tmp_path):
    """Catches a kernel that an exported program may not contain, and a platform that is left out."""
    config = load_config("digits", [*TINY, "dtype=bfloat16", "data.resolution=64"])
    save_params(tmp_path / "run", calm(build_model(config)), config)
    out = tmp_path / "out"
    flags = ["--platforms=cpu,cuda,tpu", "--num_steps=1", "--batch_size=2"]
    convert.main([f"--source={tmp_path / 'run'}", "--to=stablehlo", f"--out={out}", *flags])
    for platform in ("cpu", "cuda", "tpu"):
        made = jax.export.deserialize(bytearray((out / f"sampler_{platform}.bin").read_bytes()))
        assert made.platforms == (platform,)
    assert "attention is XLA's own" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--platforms=cpu,gpu"], "--platforms: gpu; they are cpu, cuda, tpu"),
        (["--platforms="], "they are cpu, cuda, tpu"),
        (["--batch_size=0"], "--batch_size must"),
        (["--solver=dopri5"], "--step_control=fixed"),
        (["--num_steps=none"], "--num_steps: expected whole numbers"),
    ],
)
def test_bad_exports(trained, tmp_path, flags, message):
    """Catches a traceback, or files of an export that cannot be."""
    with pytest.raises(UserError, match=message):
        source = [f"--source={pathlib.Path(trained)}", "--to=stablehlo"]
        convert.main([*source, f"--out={tmp_path / 'out'}", *flags])
    assert not (tmp_path / "out").exists()
