"""PixelFlow, the pixel-space image generator (arXiv 2504.07963), for JAX and TPU.

    import pixelflow_jax as pf
    images = pf.load("runs/digits").sample(labels=[3, 7])

The names below are imported when first used, so that `import pixelflow_jax` is quick.
"""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING

if sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv):
    # A command that has yet to import: until cli.run takes over, Ctrl-C has nothing to save or to say.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from pixelflow_jax.common.memory import restart_with_huge_pages

    restart_with_huge_pages()

if TYPE_CHECKING:  # what _HOMES says, for editors and type checkers
    from pixelflow_jax.cascade.packing import PackLayout as PackLayout
    from pixelflow_jax.cascade.stages import Cascade as Cascade
    from pixelflow_jax.common.errors import UserError as UserError
    from pixelflow_jax.config import load_config as load_config
    from pixelflow_jax.models.transformer import PixelFlow as PixelFlow
    from pixelflow_jax.pipeline import Pipeline as Pipeline
    from pixelflow_jax.pipeline import load as load
    from pixelflow_jax.sampling.generate import build_sampler as build_sampler
    from pixelflow_jax.sampling.grids import TimeGrid as TimeGrid
    from pixelflow_jax.sampling.guidance import Guidance as Guidance
    from pixelflow_jax.sampling.sampler import Sampler as Sampler
    from pixelflow_jax.sampling.solvers import SOLVERS as SOLVERS
    from pixelflow_jax.training.checkpoints import load_params as load_params
    from pixelflow_jax.training.loop import prepare as prepare
    from pixelflow_jax.training.loop import train as fit  # noqa: F401

__version__ = "0.1.0"
_HOMES = {
    "Cascade": "cascade.stages",
    "Guidance": "sampling.guidance",
    "PackLayout": "cascade.packing",
    "Pipeline": "pipeline",
    "PixelFlow": "models.transformer",
    "SOLVERS": "sampling.solvers",
    "Sampler": "sampling.sampler",
    "TimeGrid": "sampling.grids",
    "UserError": "common.errors",
    "build_sampler": "sampling.generate",
    "fit": "training.loop:train",
    "load": "pipeline",
    "load_config": "config",
    "load_params": "training.checkpoints",
    "prepare": "training.loop",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), there or name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
