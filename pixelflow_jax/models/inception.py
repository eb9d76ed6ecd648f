"""The Inception-v3 of FID: the TensorFlow graph of 2015-12-05, with weights from the public .pth file.

It differs from torchvision's: average pooling excludes padding from the mean, the last block uses
maximum pooling, images are resized as in TensorFlow 1, and there are 1008 classes. Source: Heusel et
al., arXiv 1706.08500, and its ports to PyTorch, which the names of arrays follow.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, UInt8

from pixelflow_jax.common import numerics
from pixelflow_jax.models.public import Names, public_params

SIZE = 299
NUM_LOGITS = 1008
SPATIAL_CHANNELS = 7  # used by sFID, of 192


def resize_tf1(x: Float[Array, "b h w c"], size: int = SIZE) -> Float[Array, "b size size c"]:
    """Resize bilinearly as in TensorFlow 1: output pixel i is at i * (old / new), no half pixels."""
    for axis in (1, 2):
        old = x.shape[axis]
        place = np.arange(size, dtype=np.float32) * np.float32(old / size)
        low = np.minimum(place.astype(int), old - 1)
        share = jnp.asarray(place - low, x.dtype).reshape([-1 if i == axis else 1 for i in range(4)])
        below, above = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, old - 1)))
        x = below + share * (above - below)
    return x


class Unit(nn.Module):
    """Convolution, batch normalization with stored statistics (eps 1e-3), ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        shape = self.features, self.kernel, self.stride, self.padding
        x = nn.Conv(*shape, use_bias=False, name="conv")(x)
        shape = (self.features,)
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", nn.initializers.ones, shape)
        return nn.relu((x - mean) / jnp.sqrt(var + 1e-3) * scale + bias)


zeros = nn.initializers.zeros


POOLS = {
    "average": lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
    "maximum": lambda x: nn.max_pool(x, (3, 3), padding="SAME"),
    "half": lambda x: nn.max_pool(x, (3, 3), (2, 2)),
}


def _chain(name: str, *units):
    """Return consecutive units NAME_1, NAME_2, ..., each (features, kernel)."""
    return [(f"{name}_{i}", *unit) for i, unit in enumerate(units, 1)]


# Blocks: {branch: [(name, features, kernel)]}; a list in place of a unit holds parallel units. Branches
# named "pool" begin with pooling. In "half" blocks, the last unit of each branch halves the size.
def _a(pool: int):
    return {
        "": [("branch1x1", 64, (1, 1))],
        "5x5": _chain("branch5x5", (48, (1, 1)), (64, (5, 5))),
        "3x3": _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
        "pool": [("branch_pool", pool, (1, 1))],
    }


def _c(width: int):
    double = [(width, (1, 1)), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))]
    return {
        "": [("branch1x1", 192, (1, 1))],
        "7x7": _chain("branch7x7", (width, (1, 1)), (width, (1, 7)), (192, (7, 1))),
        "7x7dbl": _chain("branch7x7dbl", *double),
        "pool": [("branch_pool", 192, (1, 1))],
    }


def _pair(name: str):
    return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]


E = {
    "": [("branch1x1", 320, (1, 1))],
    "3x3": [("branch3x3_1", 384, (1, 1)), _pair("branch3x3_2")],
    "3x3dbl": [*_chain("branch3x3dbl", (448, (1, 1)), (384, (3, 3))), _pair("branch3x3dbl_3")],
    "pool": [("branch_pool", 192, (1, 1))],
}
HALF_6A = {
    "": [("branch3x3", 384, (3, 3))],
    "dbl": _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
    "pool": [],
}
HALF_7A = {
    "": _chain("branch3x3", (192, (1, 1)), (320, (3, 3))),
    "7x7": _chain("branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))),
    "pool": [],
}
BLOCKS = {
    "Mixed_5b": (_a(32), "average"),
    "Mixed_5c": (_a(64), "average"),
    "Mixed_5d": (_a(64), "average"),
    "Mixed_6a": (HALF_6A, "half"),
    "Mixed_6b": (_c(128), "average"),
    "Mixed_6c": (_c(160), "average"),
    "Mixed_6d": (_c(160), "average"),
    "Mixed_6e": (_c(192), "average"),
    "Mixed_7a": (HALF_7A, "half"),
    "Mixed_7b": (E, "average"),
    "Mixed_7c": (E, "maximum"),
}


class Mixed(nn.Module):
    """A block of parallel branches, concatenated along the channels."""

    branches: Any
    kind: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Array, Array]:
        """Return (output, output of the first branch)."""
        outputs = []
        for branch, units in self.branches.items():
            y = POOLS[self.kind](x) if branch == "pool" else x
            for i, unit in enumerate(units):
                half = self.kind == "half" and i == len(units) - 1
                parallel = [unit] if isinstance(unit[0], str) else unit
                shape = (2, "VALID") if half else (1, "SAME")
                y = jnp.concatenate([Unit(*u, *shape, name=name)(y) for name, *u in parallel], axis=-1)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1), outputs[0]


class Inception(nn.Module):
    """Inception-v3 for FID and related metrics, in float32 on every chip."""

    @nn.compact
    @numerics.precise
    def __call__(self, pixels: UInt8[Array, "b h w 3"]) -> dict[str, Float[Array, "b d"]]:
        """Return features of images of any size.

        "2048": the pooled features (FID, precision and recall). "spatial": the first 7 channels of the
        1x1 branch of Mixed_6d, 17 x 17 x 7, which ADM's evaluator reads as "mixed_6/conv:0" for sFID.
        "logits_unbiased": for the Inception Score, as in ADM. "64", "192", "768": pooled from earlier
        layers.
        """
        x = (resize_tf1(pixels.astype(jnp.float32)) - 128) / 128
        found = {}
        x = Unit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Unit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = Unit(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = POOLS["half"](x)
        found["64"] = x.mean((1, 2))
        x = Unit(80, name="Conv2d_3b_1x1")(x)
        x = Unit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = POOLS["half"](x)
        found["192"] = x.mean((1, 2))
        for name, (branches, kind) in BLOCKS.items():
            x, first = Mixed(branches, kind, name=name)(x)
            if name == "Mixed_6d":
                found["spatial"] = first[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
            if name == "Mixed_6e":
                found["768"] = x.mean((1, 2))
        found["2048"] = x.mean((1, 2))
        kernel = self.param("fc_kernel", zeros, (2048, NUM_LOGITS))
        found["logits_unbiased"] = found["2048"] @ kernel
        found["logits"] = found["logits_unbiased"] + self.param("fc_bias", zeros, (NUM_LOGITS,))
        return found


# The arrays of a unit: the end of our path, and of the public name
UNIT = {
    ("conv", "kernel"): "conv.weight",
    ("scale",): "bn.weight",
    ("bias",): "bn.bias",
    ("mean",): "bn.running_mean",
    ("var",): "bn.running_var",
    ("fc_kernel",): "fc.weight",
    ("fc_bias",): "fc.bias",
}


def _arrays() -> tuple[Names, dict[str, Any]]:
    """Return our paths with the public names, and our parameters' shapes."""
    shapes = jax.eval_shape(Inception().init, numerics.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
    names = [
        (path, None, ".".join((*path[: -len(end)], public)))
        for path in flatten_dict(shapes["params"])
        for end, public in UNIT.items()
        if path[-len(end) :] == end
    ]
    return names, shapes["params"]


def inception_params(state: dict[str, np.ndarray]) -> dict:
    """Return our parameters from the public state dict. Raises UserError as `public_params` does."""
    unused = re.compile(r"AuxLogits\.|.*num_batches_tracked$")
    there = [name for name in state if not unused.match(name)]
    what = "these are not the weights of FID's Inception-v3"
    return public_params(state.__getitem__, there, *_arrays(), what)


def inception_names() -> set[str]:
    """Return the public names of the arrays that the network uses."""
    return {name for _, _, name in _arrays()[0]}
