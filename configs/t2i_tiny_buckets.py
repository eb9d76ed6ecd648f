"""Text to image at several aspect ratios on 2 CPU cores: continues t2i_tiny at 24x24, 16x32 and 32x16.

python -m pixelflow_jax.train --config=configs/t2i_tiny_buckets.py --workdir=runs/t2i_tiny_buckets \\
    --config.init_from=runs/t2i_tiny

4,000 steps take 18 minutes. Expected (benchmarks/text_steering.py): at these sizes, the digit is right
in 54 to 71% of samples, size, place and colours in at least 98.6%; at the unseen sizes 16x24 and 24x16,
the digit is right in 36 to 40%.
"""

from pixelflow_jax.configs.t2i_tiny import get_config as square


def get_config():
    config = square()
    config.num_train_steps = 4000
    config.data.resolution = 24
    config.data.max_aspect_ratio = 2.0
    config.data.bucket_unit = 8
    config.optimizer.learning_rate = 2e-3
    return config
