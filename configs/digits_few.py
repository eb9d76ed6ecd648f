"""Digits with one network evaluation per stage: distilled from a trained `digits` (docs/few.md).

python -m pixelflow_jax.train --config=configs/digits.py --workdir=runs/digits
python -m pixelflow_jax.train --config=configs/digits_few.py --workdir=runs/digits_few

1,500 steps take 132 to 139 s on an otherwise idle machine, less than its teacher's. Expected
(benchmarks/few.py, medians of three seeds, 2 network calls an image in place of 80): conditional
accuracy 96.2% (its teacher: 97.1%), Frechet ratio 1.74 (1.67), nearest ratio 1.19.
"""

from pixelflow_jax.config import distilled
from pixelflow_jax.configs import digits


def get_config():
    config = distilled(digits.get_config(), "runs/digits")
    config.num_train_steps = 1500
    config.checkpoint_every = config.sample_every = 500
    config.optimizer.learning_rate = 1e-3
    config.sample.num_steps = (1,)  # 2, 4 or 8 work too
    return config
