"""ImageNet 256x256 with heads of 128: the released model's width and depth, as TPUs like them.

python -m pixelflow_jax.train --config=configs/imagenet256_xl_tpu.py --workdir=gs://BUCKET/xl_tpu

9 heads x 128 in place of 16 x 72: a TPU's lanes come in 128, so heads of 72 take the time and memory
of 128 and waste 44% of them in attention. Width 1152, depth 28 and the parameter count stay as they
are. It is another network than the released one: weights do not carry over. See docs/performance.md.
"""

from pixelflow_jax.configs import imagenet256_xl


def get_config():
    config = imagenet256_xl.get_config()
    config.model.num_heads, config.model.head_dim = 9, 128
    return config
