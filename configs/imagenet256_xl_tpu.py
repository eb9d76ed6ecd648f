"""ImageNet 256x256 with heads of 128: the width and depth of the released model, adapted to TPUs.

python -m pixelflow_jax.train --config=configs/imagenet256_xl_tpu.py --workdir=gs://BUCKET/xl_tpu

Uses 9 heads x 128 instead of 16 x 72. A TPU has 128 lanes, so heads of 72 take the time and memory of
128 and waste 44% of them in attention. Width 1152, depth 28 and the parameter count are unchanged. The
network differs from the released one, so its weights cannot be used. See docs/performance.md.
"""

from pixelflow_jax.configs import imagenet256_xl


def get_config():
    config = imagenet256_xl.get_config()
    config.model.num_heads, config.model.head_dim = 9, 128
    return config
