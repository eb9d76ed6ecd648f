"""Where images come from: uint8 [N, H, W, 3] and int32 labels [N], in a fixed order."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from pixelflow_jax.errors import UserError

HOLD_OUT_EVERY = 4  # of the digits, every 4th image is kept for evaluation


class Examples(NamedTuple):
    """Images in memory with their class labels."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]


def load_source(config: ConfigDict, split: str = "train") -> Examples:
    """The examples that `config.data` names; split is "train" or "test".

    Raises:
      UserError: for an unknown source, or labels that the model has no class for.
    """
    if config.data.source not in SOURCES:
        raise UserError(
            f"config.data.source must be one of {', '.join(SOURCES)}, got {config.data.source!r}"
        )
    examples = SOURCES[config.data.source](config.data, split)
    classes = config.model.num_classes
    if classes and examples.labels.max() >= classes:
        raise UserError(
            f"config.data.source={config.data.source} has {examples.labels.max() + 1} classes, but "
            f"config.model.num_classes is {classes}"
        )
    return examples


def digits(data: ConfigDict, split: str) -> Examples:
    """scikit-learn's 1,797 handwritten digits (8x8 scans), bicubic to `resolution`, grey as RGB."""
    from sklearn.datasets import load_digits  # takes a second to import

    bundle = load_digits()
    held_out = np.arange(len(bundle.target)) % HOLD_OUT_EVERY == 0
    chosen = held_out if split == "test" else ~held_out
    size = (data.resolution, data.resolution)
    scans = np.round(bundle.images[chosen] * (255 / 16)).astype(np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.BICUBIC)) for x in scans])
    images = np.repeat(grey[..., None], 3, axis=-1)
    return Examples(images, bundle.target[chosen].astype(np.int32))


SOURCES = {"digits": digits}
