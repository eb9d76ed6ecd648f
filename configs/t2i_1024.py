"""Text to image at 1024x1024: continues t2i_512 at a higher resolution.

python -m pixelflow_jax.train --config=configs/t2i_1024.py --workdir=runs/t2i_1024 \\
    --config.data.path=PICTURES --config.init_from=runs/t2i_512

Hardware: a TPU of 32 chips, or 64 of v5p:4x4x4 with --config.data.max_aspect_ratio=1
--config.mesh.data=2 --config.mesh.fsdp=8 --config.mesh.context=4 --config.accumulation_steps=2
(compile_check: 17.3 GiB per chip). Expected: not run yet.
"""

from pixelflow_jax.configs.t2i_512 import get_config as coarser


def get_config():
    config = coarser()
    config.num_train_steps = 100_000
    config.batch_size = 128
    config.data.resolution = 1024  # 1024x1024, 896x1152, 768x1344, ...
    config.optimizer.learning_rate = 5e-5
    config.text.max_length = 512  # as in the released model
    return config
