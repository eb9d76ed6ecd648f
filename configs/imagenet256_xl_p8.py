"""The released class model with patches of 8 in the last stage, a third of its cost: from the release.

python -m pixelflow_jax.convert --source=OFFICIAL --out=weights/imagenet256_xl
python -m pixelflow_jax.train --config=configs/imagenet256_xl_p8.py --workdir=gs://BUCKET/xl_p8 \\
    --config.init_from=weights/imagenet256_xl

Not run: 160,000 steps are 10% of the release's. Data and hardware: as imagenet256_xl;
docs/performance.md has the memory and the projected speed.
"""

from pixelflow_jax.configs import imagenet256_xl


def get_config():
    config = imagenet256_xl.get_config()
    config.init_from = "weights/imagenet256_xl"
    config.num_train_steps = 160_000
    config.model.patch_size = (4, 4, 4, 8)
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 1000
    return config
