"""PixelFlow, the pixel-space image generator (arXiv 2504.07963), for JAX and TPU.

The names below are imported when first used, so that `import pixelflow_jax` is quick.
"""

import importlib

_HOMES = {
    "Cascade": "cascade",
    "Guidance": "sampling.guidance",
    "PackLayout": "packing",
    "PixelFlow": "models.transformer",
    "Sampler": "sampling.sampler",
    "TimeGrid": "sampling.grids",
    "UserError": "errors",
    "build_sampler": "sampling.generate",
    "load_config": "config",
    "load_params": "training.checkpoints",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
