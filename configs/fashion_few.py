"""Fashion-MNIST with two, two and one network evaluations: distilled from a `fashion` (docs/few.md).

python -m pixelflow_jax.train --config=configs/fashion.py --workdir=runs/fashion
python -m pixelflow_jax.train --config=configs/fashion_few.py --workdir=runs/fashion_few

900 steps. Measured with one seed (benchmarks/few.py; a teacher of 2,600 steps): conditional accuracy
80.9% (its teacher: 83.5%), Frechet ratio 38.7 (37.7), with 5 network calls an image in place of 90.
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
