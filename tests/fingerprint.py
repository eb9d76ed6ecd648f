"""Print, as JSON, digests of the results of `sample` and of the first train steps, for test_switches.py.

python tests/fingerprint.py CHECKPOINT
"""

import hashlib
import json
import sys
import tempfile

import jax
import numpy as np

import pixelflow_jax as pf
from pixelflow_jax import sample
from pixelflow_jax.common import cli

from conftest import TINY


def digest(tree) -> str:
    """Return a digest of all bytes, dtypes and shapes of a tree of arrays."""
    found = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        found.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return found.hexdigest()[:16]


def fingerprints(checkpoint: str, steps: int = 1) -> dict[str, str]:
    """Return digests of the images of `sample` and `Pipeline`, and of the parameters after `steps`."""
    found = {"pipeline": digest(pf.load(checkpoint).sample(labels=[3, 7, 1], seed=5, solver="heun"))}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--labels=3,7,1", "--seed=5", "--solver=heun", "--num_png=0"]
        cli.run(lambda: sample.main([f"--checkpoint={checkpoint}", f"--out={folder}/images", *flags]))
        with np.load(f"{folder}/images/samples.npz") as file:
            found["sample"] = digest(file["arr_0"])
        found["settings"] = json.loads(open(f"{folder}/images/settings.json").read()).get("jax_switches")
        config = pf.load_config("configs/digits.py", [*TINY, f"num_train_steps={steps}"])
        state, _ = pf.fit(config, f"{folder}/run")
        found["train"] = digest(state.params)
    return found


if __name__ == "__main__":
    print(json.dumps(fingerprints(sys.argv[1])))
