"""A checkpoint with the adapters that were trained on it."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from pixelflow_jax.common import UserError
from pixelflow_jax.models import lora
from pixelflow_jax.training.checkpoints import load_any, load_params
from pixelflow_jax.training.fingerprints import params_hash


def load_with_adapters(
    checkpoint: epath.PathLike, adapters: epath.PathLike, scale: float = 1.0, ema: float | None = None
) -> tuple[dict, ConfigDict, dict[str, Any]]:
    """Return what `load_params` does, with a run's adapters added (models/lora.py), times `scale`.

    `ema` is that of the adapters. Classes of their data take the places of those with the same numbers.
    Raises UserError as `load_params`, and for adapters of other parameters.
    """
    params, config, meta = load_params(checkpoint)
    found, its, own = load_any(adapters, ema)
    if not its.lora.rank:
        raise UserError(f"--lora={adapters} holds no adapters: it is a checkpoint of its own")
    digest = params_hash(params)
    if own.get("base_sha256") != digest:
        raise UserError(
            f"--lora={adapters} belongs to {its.init_from} (sha256 {str(own.get('base_sha256'))[:12]}), "
            f"not to --checkpoint={checkpoint} ({digest[:12]})"
        )
    config.sample = its.sample
    named = [names for x in (meta, own) if isinstance(names := x.get("classes"), dict)]
    classes = {number: name for names in named for number, name in names.items()}
    meta |= {"step": own["step"], "ema": own["ema"], "classes": classes}
    return lora.merged(params, found, scale), config, meta
