"""Captioned digits with one network evaluation per stage: distilled from a `t2i_tiny` (docs/few.md).

python -m pixelflow_jax.train --config=configs/t2i_tiny.py --workdir=runs/t2i_tiny
python -m pixelflow_jax.train --config=configs/t2i_tiny_few.py --workdir=runs/t2i_tiny_few

2,000 steps. Measured with one seed (benchmarks/few.py; the teacher was t2i_tiny at its last step): the
digit is right in 88.4% of samples (its teacher at guidance 2: 88.6%), with two evaluations per stage in
90.8%, every other attribute in at least 99.8%.
"""

from pixelflow_jax.config import distilled
from pixelflow_jax.configs import t2i_tiny


def get_config():
    config = distilled(t2i_tiny.get_config(), "runs/t2i_tiny")
    config.distill.guidance_scale = 2.6  # above the teacher's 2, as few steps lose some of its effect
    config.num_train_steps = 2000
    config.checkpoint_every = config.sample_every = 1000
    config.optimizer.learning_rate = 1e-3
    config.sample.num_steps = (1,)
    return config
