"""Text to image at 512x512: continues t2i_256 at a higher resolution.

python -m pixelflow_jax.train --config=configs/t2i_512.py --workdir=runs/t2i_512 \\
    --config.data.path=PICTURES --config.init_from=runs/t2i_256

Hardware: a TPU of 64 chips (a projection). Expected: not run yet.
"""

from pixelflow_jax.configs.t2i_256 import get_config as coarser


def get_config():
    config = coarser()
    config.num_train_steps = 200_000
    config.batch_size = 256
    config.data.resolution = 512
    config.data.bucket_unit = 64  # 512x512, 448x576, 384x640, ...
    config.optimizer.learning_rate = 5e-5
    return config
