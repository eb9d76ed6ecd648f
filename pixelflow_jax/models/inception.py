"""The Inception-v3 of FID: the TensorFlow graph of 2015-12-05, whose weights the public .pth holds.

It differs from torchvision's: average pooling leaves padding out of its mean, the last block pools by
maximum, images are resized as TensorFlow 1 did, and there are 1008 classes. Source: Heusel et al., arXiv
1706.08500, and its ports to PyTorch, whose names of arrays are kept.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, UInt8

from pixelflow_jax.common import numerics
from pixelflow_jax.common.errors import UserError

SIZE = 299
NUM_LOGITS = 1008
SPATIAL_CHANNELS = 7  # of the 192 that sFID takes


def resize_tf1(x: Float[Array, "b h w c"], size: int = SIZE) -> Float[Array, "b size size c"]:
    """Bilinear, as TensorFlow 1 had it: pixel i of the result lies at i * (old / new), no half pixel."""
    for axis in (1, 2):
        old = x.shape[axis]
        place = np.arange(size, dtype=np.float32) * np.float32(old / size)
        low = np.minimum(place.astype(int), old - 1)
        share = jnp.asarray(place - low, x.dtype).reshape([-1 if i == axis else 1 for i in range(4)])
        below, above = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, old - 1)))
        x = below + share * (above - below)
    return x


class Unit(nn.Module):
    """Convolution, batch normalisation by stored statistics (eps 1e-3), ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        x = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            padding=[(k // 2, k // 2) if self.same else (0, 0) for k in self.kernel],
            use_bias=False,
            name="conv",
        )(x)
        shape = (self.features,)
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", nn.initializers.ones, shape)
        return nn.relu((x - mean) / jnp.sqrt(var + 1e-3) * scale + bias)


zeros = nn.initializers.zeros


def _average(x):
    return nn.avg_pool(x, (3, 3), padding=[(1, 1), (1, 1)], count_include_pad=False)


def _maximum(x, stride: int = 1):
    same = [(1, 1), (1, 1)] if stride == 1 else "VALID"
    return nn.max_pool(x, (3, 3), (stride, stride), padding=same)


# The blocks: {branch: [(name, features, kernel)]}; a list in place of such a unit: its units stand
# side by side. "pool" branches begin with a pooling. "half" blocks halve the size in each last unit.
def _a(pool: int):
    return {
        "": [("branch1x1", 64, (1, 1))],
        "5x5": [("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))],
        "3x3": [
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ],
        "pool": [("branch_pool", pool, (1, 1))],
    }


def _c(width: int):
    return {
        "": [("branch1x1", 192, (1, 1))],
        "7x7": [
            ("branch7x7_1", width, (1, 1)),
            ("branch7x7_2", width, (1, 7)),
            ("branch7x7_3", 192, (7, 1)),
        ],
        "7x7dbl": [
            ("branch7x7dbl_1", width, (1, 1)),
            ("branch7x7dbl_2", width, (7, 1)),
            ("branch7x7dbl_3", width, (1, 7)),
            ("branch7x7dbl_4", width, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        "pool": [("branch_pool", 192, (1, 1))],
    }


E = {
    "": [("branch1x1", 320, (1, 1))],
    "3x3": [
        ("branch3x3_1", 384, (1, 1)),
        [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))],
    ],
    "3x3dbl": [
        ("branch3x3dbl_1", 448, (1, 1)),
        ("branch3x3dbl_2", 384, (3, 3)),
        [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
    ],
    "pool": [("branch_pool", 192, (1, 1))],
}
HALF_6A = {
    "": [("branch3x3", 384, (3, 3))],
    "dbl": [
        ("branch3x3dbl_1", 64, (1, 1)),
        ("branch3x3dbl_2", 96, (3, 3)),
        ("branch3x3dbl_3", 96, (3, 3)),
    ],
    "pool": [],
}
HALF_7A = {
    "": [("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3))],
    "7x7": [
        ("branch7x7x3_1", 192, (1, 1)),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, (3, 3)),
    ],
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
    """A block of parallel branches, joined along the channels."""

    branches: Any
    kind: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Array, Array]:
        """(output, the first branch alone)."""
        outputs = []
        for branch, units in self.branches.items():
            y = x
            if branch == "pool":
                y = {"average": _average, "maximum": _maximum, "half": lambda x: _maximum(x, 2)}[
                    self.kind
                ](x)
            for i, unit in enumerate(units):
                half = self.kind == "half" and i == len(units) - 1
                if not isinstance(unit[0], str):
                    y = jnp.concatenate([Unit(*rest, name=name)(y) for name, *rest in unit], axis=-1)
                else:
                    name, features, kernel = unit
                    y = Unit(features, kernel, 2 if half else 1, not half, name=name)(y)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1), outputs[0]


class Inception(nn.Module):
    """Inception-v3 for FID and its kin, in float32 on every chip."""

    @nn.compact
    @numerics.precise
    def __call__(self, pixels: UInt8[Array, "b h w 3"]) -> dict[str, Float[Array, "b d"]]:
        """Features of images of any size.

        "2048": the pooled features (FID, precision and recall). "spatial": the first 7 channels of the
        1x1 branch of Mixed_6d, 17 x 17 x 7, which ADM's evaluator reads as "mixed_6/conv:0" for sFID.
        "logits_unbiased": for the Inception Score, as ADM has it. "64", "192", "768": pooled earlier.
        """
        x = (resize_tf1(pixels.astype(jnp.float32)) - 128) / 128
        found = {}
        x = Unit(32, (3, 3), 2, False, name="Conv2d_1a_3x3")(x)
        x = Unit(32, (3, 3), 1, False, name="Conv2d_2a_3x3")(x)
        x = Unit(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _maximum(x, 2)
        found["64"] = x.mean((1, 2))
        x = Unit(80, name="Conv2d_3b_1x1")(x)
        x = Unit(192, (3, 3), 1, False, name="Conv2d_4a_3x3")(x)
        x = _maximum(x, 2)
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


# Of a unit's official arrays: the end of the name, ours, and the way of its axes
UNIT = {
    "conv.weight": (("conv", "kernel"), (2, 3, 1, 0)),
    "bn.weight": (("scale",), (0,)),
    "bn.bias": (("bias",), (0,)),
    "bn.running_mean": (("mean",), (0,)),
    "bn.running_var": (("var",), (0,)),
}


def inception_params(state: dict[str, np.ndarray]) -> dict:
    """Our parameters from the public state dict.

    Raises:
      UserError: if an array is missing, left over or of a wrong shape.
    """
    shapes = jax.eval_shape(Inception().init, numerics.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
    expected = {path: x.shape for path, x in flatten_dict(shapes["params"], sep="/").items()}
    params, problems = {}, []
    for name, array in state.items():
        if name.endswith("num_batches_tracked") or name.startswith("AuxLogits."):
            continue
        ours, axes = _our_name(name)
        if ours not in expected:
            problems.append(f"left over: {name}")
        elif len(axes) != np.ndim(array) or tuple(np.shape(array)[i] for i in axes) != expected[ours]:
            problems.append(f"{name} has shape {np.shape(array)}")
        else:
            params[ours] = np.asarray(array, np.float32).transpose(axes)
            del expected[ours]
    problems += [f"missing: {name}" for name in expected]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"these are not the weights of FID's Inception-v3: {'; '.join(problems[:5])}{more}"
        )
    return unflatten_dict(params, sep="/")


def inception_names() -> set[str]:
    """The public names of the arrays that are used."""
    shapes = jax.eval_shape(Inception().init, numerics.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
    ends = {ours: theirs for theirs, (ours, _) in UNIT.items()}
    names = {"fc.weight", "fc.bias"}
    for path in flatten_dict(shapes["params"]):
        for cut in (-1, -2):
            if path[cut:] in ends:
                names.add(".".join((*path[:cut], ends[path[cut:]])))
    return names


def _our_name(name: str) -> tuple[str, tuple[int, ...]]:
    """(our path, order of axes) of an official array; ("", ()) if the name is not known."""
    if name in ("fc.weight", "fc.bias"):
        return ("fc_kernel", (1, 0)) if name == "fc.weight" else ("fc_bias", (0,))
    match = re.fullmatch(r"(.+?)\.(conv\.weight|bn\.\w+)", name)
    if not match or match[2] not in UNIT:
        return "", ()
    path, axes = UNIT[match[2]]
    return "/".join([*match[1].split("."), *path]), axes
