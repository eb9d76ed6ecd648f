"""Fashion-MNIST with two, two and one network evaluations: distilled from a `fashion` (docs/few.md).

python -m pixelflow_jax.train --config=configs/fashion.py --workdir=runs/fashion
python -m pixelflow_jax.train --config=configs/fashion_few.py --workdir=runs/fashion_few

900 steps. Its quality has not been measured yet.
"""

from pixelflow_jax.config import distilled
from pixelflow_jax.configs import fashion


def get_config():
    config = distilled(fashion.get_config(), "runs/fashion")
    config.num_train_steps = 900
    config.checkpoint_every = config.sample_every = 300
    config.optimizer.learning_rate = 1e-3
    config.sample.num_steps = (2, 2, 1)
    return config
