"""A base-size class model for ImageNet 256x256: 12 heads x 64, depth 12, 131M parameters.

python -m pixelflow_jax.train --config=configs/imagenet256_b.py --workdir=gs://BUCKET/imagenet256_b

Data: as for imagenet256_xl. Hardware: a TPU slice of at least 8 chips. This size is our own, so there is
no published result.
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
    config.data.source = "tfds"
    config.data.name = "imagenet2012"
    config.data.num_workers = 16
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.data.resolution = 256
    return config
