"""The released class model with two, two, two and one network evaluations: distilled from the release.

python -m pixelflow_jax.convert --source=OFFICIAL --out=weights/imagenet256_xl
python -m pixelflow_jax.train --config=configs/imagenet256_xl_few.py --workdir=gs://BUCKET/xl_few \\
    --config.distill.teacher=weights/imagenet256_xl

Not run: 20,000 steps are 1.25% of the release's. Data and hardware: as imagenet256_xl; docs/few.md has
the memory and the projected speed.
"""

from pixelflow_jax.config import distilled
from pixelflow_jax.configs import imagenet256_xl


def get_config():
    config = distilled(imagenet256_xl.get_config(), "weights/imagenet256_xl")
    config.num_train_steps = 20_000
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 500
    config.ema.decays = (0.999,)
    config.sample.num_steps = (2, 2, 2, 1)
    return config
