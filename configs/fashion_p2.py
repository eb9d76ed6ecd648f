"""Fashion-MNIST as in fashion.py, in patches of 2: finer pictures, in about 70 minutes on 2 CPU cores.

apt-get install dataset-fashion-mnist
python -m pixelflow_jax.train --config=configs/fashion_p2.py --workdir=runs/fashion_p2

1.04 s a step where nothing else runs. Measured with one seed, 1000 samples (benchmarks/quality.py):
accuracy 87.5% (held-out real images: 86.6%), Frechet ratio 35.5, nearest 1.05. docs/fashion.png shows
its samples. With --config.model.patch_size='(2, 2, 4)' it takes 28 minutes: 85.9%, 35.9, 1.09
(docs/performance.md).
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
