"""Captioned digits with one network evaluation per stage: distilled from a `t2i_tiny` (docs/few.md).

python -m pixelflow_jax.train --config=configs/t2i_tiny.py --workdir=runs/t2i_tiny
python -m pixelflow_jax.train --config=configs/t2i_tiny_few.py --workdir=runs/t2i_tiny_few

2,000 steps. Measured with one seed (benchmarks/few.py; the teacher was t2i_tiny at its last step): the
digit is right in 84.1% of samples (its teacher: 88.6%), with two evaluations per stage in 86.6%, every
other attribute in at least 99.6%.
"""

from pixelflow_jax.config import distilled
from pixelflow_jax.configs import t2i_tiny


def get_config():
    config = distilled(t2i_tiny.get_config(), "runs/t2i_tiny")
    config.num_train_steps = 2000
    config.checkpoint_every = config.sample_every = 1000
    config.optimizer.learning_rate = 1e-3
    config.sample.num_steps = (1,)
    return config
