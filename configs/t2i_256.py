"""Text to image at 256x256: the released text model's network, initialized from the class model.

python -m pixelflow_jax.train --config=configs/t2i_256.py --workdir=runs/t2i_256 \\
    --config.data.path=PICTURES --config.init_from=runs/imagenet256_xl

Hardware: a TPU of 64 or 128 chips (a projection; see docs/tpu.md). The text encoder is Flan-T5-XL, from
the hub or a folder; `python -m pixelflow_jax.encode` encodes all captions once (docs/text.md). Expected:
not run yet. Continue with t2i_512, then t2i_1024; pass the previous workdir as --config.init_from=.
"""

from pixelflow_jax.config import default_config


def get_config():
    config = default_config()
    config.dtype = "bfloat16"
    config.num_train_steps = 400_000
    config.batch_size = 512
    config.model.num_classes = 0
    config.model.context_dim = 2048
    config.model.cross_gate = True  # starts as the class model; `convert --to=official` folds it in
    config.model.remat = "full"
    config.text.encoder = "google/flan-t5-xl"
    config.text.max_length = 128
    config.data.source = "caption_folder"
    config.data.resolution = 256
    config.data.max_aspect_ratio = 2.0  # 256x256, 224x288, 192x320, ...
    config.data.bucket_unit = 32
    config.data.crop = "center"
    config.data.flip = False  # captions say left and right
    config.optimizer.warmup_steps = 1000
    config.mesh.fsdp = 8
    config.sample.guidance_scale = 4.0
    config.sample.guidance_schedule = "constant"
    return config
