from pixelflow_jax.configs.digits import get_config as teacher


def get_config():
    config = teacher()
    config.num_train_steps = 2000
    config.distill.guidance_scale = config.sample.guidance_scale
    config.distill.guidance_schedule = config.sample.guidance_schedule
    config.data.label_dropout = 0.0
    config.optimizer.learning_rate = 1e-3
    config.sample.num_steps = (1,)
    config.sample.guidance_scale = 0.0
    return config
