"""Fashion-MNIST as in fashion.py, in patches of 2: finer pictures, in about 70 minutes on 2 CPU cores.

apt-get install dataset-fashion-mnist
python -m pixelflow_jax.train --config=configs/fashion_p2.py --workdir=runs/fashion_p2

Not run to its end yet: 1.04 s a step where nothing else runs; samples at step 2,000 are clear.
"""

from pixelflow_jax.configs import fashion


def get_config():
    config = fashion.get_config()
    config.num_train_steps = 4000
    config.log_every = 100
    config.checkpoint_every = 400
    config.sample_every = 2000
    config.model.patch_size = 2
    config.ema.decays = (0.999,)
    return config
