"""The default: scikit-learn's handwritten digits, 16x16, two stages, on 2 CPU cores.

python -m pixelflow_jax.train --config=configs/digits.py --workdir=runs/digits

3,600 steps take 3 to 5 minutes on an otherwise idle machine: 211 s where the form before, of six layers
and 4,200 steps without huge pages, took 471 s, and 280 s against 599 s beside one busy thread (one pair
each, in turn). Expected (benchmarks/quality.py, medians of three seeds): conditional accuracy 97.3%
(held-out real digits: 99.8%), Frechet ratio 1.89, nearest ratio 1.14. Six layers learn less per second
(seed 0, a cosine schedule from 3e-3): 2,500 steps in 190 s give 96.8%, 1.87, 1.18, where four layers
with that schedule have 97.1%, 1.90, 1.16 after 152 s.
"""

from pixelflow_jax.config import default_config


def get_config():
    config = default_config()
    config.num_train_steps = 3600
    config.batch_size = 32
    config.log_every = 100
    config.checkpoint_every = 1200
    config.sample_every = 1200

    config.model.num_heads = 3
    config.model.head_dim = 64
    config.model.depth = 4
    config.model.patch_size = 4
    config.model.num_classes = 10
    config.model.scan_unroll = 4

    config.cascade.num_stages = 2
    config.data.source = "digits"
    config.data.resolution = 16
    config.data.crop = "none"
    config.data.flip = False
    config.data.num_threads = 1

    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.99
    config.ema.decays = (0.998,)
    config.ema.warmup = True

    config.sample.num_steps = (20,)
    config.sample.guidance_scale = 1.2
    config.sample.guidance_schedule = "constant"  # the first stage (8x8) already determines the class
    config.sample.num_images = 100
    return config
