"""A base size of the class model for ImageNet 256x256: 12 heads x 64, depth 12, 131M parameters.

python -m pixelflow_jax.train --config=configs/imagenet256_b.py --workdir=gs://BUCKET/imagenet256_b

Hardware: a TPU slice of 8 chips or more; the ImageNet source comes with the data pipeline. No
published result: this size is ours.
"""

from pixelflow_jax.config import default_config


def get_config():
    config = default_config()
    config.num_train_steps = 400_000
    config.batch_size = 256
    config.dtype = "bfloat16"
    config.model.num_heads = 12
    config.model.head_dim = 64
    config.model.depth = 12
    config.data.source = "imagenet"
    config.data.resolution = 256
    return config
