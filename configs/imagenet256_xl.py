"""The released class model, exactly: ImageNet 256x256, 677M parameters.

python -m pixelflow_jax.train --config=configs/imagenet256_xl.py --workdir=gs://BUCKET/imagenet256_xl

Data: TFDS's imagenet2012, prepared as ArrayRecord (or --config.data.source=folder, see
docs/training.md). Hardware: a TPU slice; one step at batch 256 takes 5.9 GiB per chip of v5e:4x4
(compile_check). Published (Dopri5, stage-wise guidance 2.4): FID 1.98. To sample from the released
weights, convert them first.
"""

from pixelflow_jax.config import default_config


def get_config():
    config = default_config()  # the defaults describe this model: 16 heads x 72, depth 28, patch 4
    config.num_train_steps = 1_600_000  # 320 epochs at batch 256
    config.batch_size = 256
    config.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "tfds"
    config.data.name = "imagenet2012"
    config.data.num_workers = 16
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.data.resolution = 256
    config.sample.guidance_scale = 2.4
    return config
