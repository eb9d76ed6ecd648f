"""Fashion-MNIST, 28x28 padded to 32x32, three stages, for a few CPU cores.

apt-get install dataset-fashion-mnist
python -m pixelflow_jax.train --config=configs/fashion.py --workdir=runs/fashion

Expected after 10 minutes (docs/training.md): conditional accuracy 77% (held-out real images: 87%).
For any other folder of MNIST-format files, pass --config.data.path=FOLDER.
"""

from pixelflow_jax.config import default_config


def get_config():
    config = default_config()
    config.num_train_steps = 1100
    config.batch_size = 48
    config.log_every = 50
    config.checkpoint_every = 550
    config.sample_every = 550

    config.model.num_heads = 3
    config.model.head_dim = 64
    config.model.depth = 6
    config.model.patch_size = 4
    config.model.num_classes = 10
    config.model.scan_unroll = 6

    config.cascade.num_stages = 3
    config.data.source = "idx"
    config.data.path = "/usr/share/datasets/fashion-mnist"
    config.data.resolution = 32
    config.data.crop = "none"
    config.data.flip = False
    config.data.num_threads = 1

    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.99
    config.ema.decays = (0.998,)
    config.ema.warmup = True

    config.sample.num_steps = (15,)
    config.sample.guidance_scale = 1.5
    config.sample.guidance_schedule = "constant"
    config.sample.num_images = 100
    return config
