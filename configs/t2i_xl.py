"""The released text model's network: 882M parameters, Flan-T5-XL states (width 2048), up to 1024x1024.

python -m pixelflow_jax.convert --source=OFFICIAL_TEXT_MODEL --out=runs/t2i_xl

The network converts, runs and matches the official one (docs/parity.md). Its text encoder, Flan-T5-XL,
comes from the hub or from the folder in `sample --text_encoder=FOLDER`. To train it, see t2i_256.
"""

from pixelflow_jax.config import default_config


def get_config():
    config = default_config()
    config.dtype = "bfloat16"
    config.model.num_classes = 0
    config.model.context_dim = 2048
    config.text.encoder = "google/flan-t5-xl"
    config.text.max_length = 512
    config.data.resolution = 1024
    config.sample.guidance_scale = 4.0
    config.sample.guidance_schedule = "constant"
    return config
