"""Convert the official network's weights and config to ours and back."""

import math
from typing import Any, NamedTuple

import numpy as np
import yaml
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from pixelflow_jax.common import UserError, blame, files
from pixelflow_jax.config import build_model, check_config, default_config
from pixelflow_jax.foreign.weights import INDEX, KINDS, State, read_state
from pixelflow_jax.models.conditioning import INTERVAL, TEXT, abstract_params
from pixelflow_jax.models.public import Names, public_params, public_view

Params = dict[str, Any]
CONFIG = "config.yaml"


class Rule(NamedTuple):
    """The official name of an array, and our path."""

    official: str
    ours: tuple[str, ...]


def _dense(official: str, *ours: str) -> list[Rule]:
    names = {"weight": "kernel", "bias": "bias"}
    return [Rule(f"{official}.{theirs}", (*ours, own)) for theirs, own in names.items()]


def _attention(official: str, ours: str) -> list[Rule]:
    rules = [rule for name in "qkvo" for rule in _dense(f"{official}.{name}_proj", ours, name)]
    norms = ("q_norm", "k_norm")
    return rules + [Rule(f"{official}.{name}.weight", (ours, name, "scale")) for name in norms]


def _block_rules(text: bool) -> list[Rule]:
    """Return the rules within `transformer_blocks.<i>` and within our stacked `blocks`."""
    rules = _dense("norm1.linear", "modulation") + _attention("attn1", "self_attention")
    if text:
        rules.append(Rule("norm2.weight", ("cross_norm", "scale")))
        rules += _attention("attn2", "cross_attention")
    rules.append(Rule("norm3.weight", ("mlp_norm", "scale")))
    return rules + _dense("mlp.fc1", "mlp_1") + _dense("mlp.fc2", "mlp_2")


def _outer_rules(patch_size: int, classes: bool) -> list[Rule]:
    """Return the rules outside the blocks."""
    if not isinstance(patch_size, int):
        raise UserError(f"the official network has one patch size for all stages, not {patch_size}")
    rules = _dense("patch_embed.proj", "patch_embed")
    for official, ours in (("timestep_embedder", "time_embed"), ("latent_size_embedder", "size_embed")):
        rules += _dense(f"{official}.linear_1", ours, "linear_1")
        rules += _dense(f"{official}.linear_2", ours, "linear_2")
    if classes:
        rules.append(Rule("class_embedder.embedding_table.weight", ("class_embed", "embedding")))
    return rules + _dense("proj_out_1", "head_modulation") + _dense("proj_out_2", "head")


def _names(config: ConfigDict) -> Names:
    """Return (our path, layer or None, official name) of every array of this config's network."""
    model = config.model
    outer = _outer_rules(model.patch_size, model.num_classes > 0)
    return [(rule.ours, None, rule.official) for rule in outer] + [
        (("blocks", *rule.ours), i, f"transformer_blocks.{i}.{rule.official}")
        for rule in _block_rules(model.context_dim > 0)
        for i in range(model.depth)
    ]


def official_names(config: ConfigDict) -> set[str]:
    """Return the names of all arrays of the official network of this config."""
    return {name for _, _, name in _names(config)}


def _view(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Return a view of our array in the official layout: patches have channels first, ours last."""
    if path == ("patch_embed", "kernel"):
        side = math.isqrt(len(array) // 3)
        array = array.reshape(side, side, 3, -1)
    return public_view(path, array)


def from_official(state: State, config: ConfigDict) -> Params:
    """Return our parameters (float32) from an official state dict. Raises as `public_params` does."""
    names, shapes = _names(config), abstract_params(build_model(config))
    what = "the weights do not fit the config"
    return public_params(state.__getitem__, state, names, shapes, what, "the config needs", _view)


def to_official(params: Params, config: ConfigDict) -> State:
    """Return the official state dict (float32) from ours; folds in a gate on cross-attention.

    Raises UserError if the model has a text encoder or is distilled, for which official weights have no
    place.
    """
    for part, known in {"contains a text encoder": TEXT, "is distilled": INTERVAL}.items():
        if known in params:
            raise UserError(f"this model {part}, which official weights cannot hold")
    model = config.model
    ours = {path: np.asarray(x) for path, x in flatten_dict(params).items()}
    if model.context_dim and model.cross_gate:
        gate, last = ours["blocks", "cross_gate"], ("blocks", "cross_attention", "o")
        ours[*last, "kernel"] = ours[*last, "kernel"] * gate[:, None]
        ours[*last, "bias"] = ours[*last, "bias"] * gate
    state = {}
    for path, layer, name in _names(config):
        state[name] = np.ascontiguousarray(_view(path, ours[path][... if layer is None else layer]))
    return state


def official_config(values: dict[str, Any]) -> ConfigDict:
    """Return our config from the contents of an official config.yaml.

    Raises UserError if a key is missing or the network is of a kind that was never released.
    """
    try:
        model, scheduler = values["model"]["params"], values["scheduler"]
        config = default_config()
        config.model.num_heads = int(model["num_attention_heads"])
        config.model.head_dim = int(model["attention_head_dim"])
        config.model.depth = int(model["depth"])
        config.model.patch_size = int(model["patch_size"])
        config.model.num_classes = int(model.get("num_classes") or 0)
        config.model.context_dim = int(model.get("cross_attention_dim") or 0)
        config.cascade.num_stages = int(scheduler["num_stages"])
        data = values.get("data") or {}
        config.data.resolution = int(data.get("resolution") or 256)
        times = int(scheduler.get("num_train_timesteps", 1000))
        channels = {int(model.get("in_channels", 3)), int(model.get("out_channels", 3))}
        bias = bool(model.get("attention_bias", True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"not an official config.yaml: {type(error).__name__} {error}") from None
    if times != 1000 or channels != {3} or not bias:
        raise UserError(
            f"the official config has num_train_timesteps {times}, channels {sorted(channels)}, "
            f"attention_bias {bias}; supported are 1000, [3] and True"
        )
    if config.model.context_dim:
        config.sample.guidance_schedule = "constant"
        config.text.encoder, config.text.max_length = "google/flan-t5-xl", 512
    stages = max(config.cascade.num_stages, 1)
    config.batch_size = max(config.batch_size // stages, 1) * stages
    check_config(config)
    return config


def official_yaml(config: ConfigDict) -> dict[str, Any]:
    """Return the contents of an official config.yaml from our config."""
    model = config.model
    if abs(config.cascade.gamma + 1 / 3) > 1e-6:
        raise UserError(f"the official network has cascade.gamma -1/3, not {config.cascade.gamma}")
    params = dict(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.head_dim,
        in_channels=3,
        out_channels=3,
        depth=model.depth,
        num_classes=model.num_classes,
        patch_size=model.patch_size,
        attention_bias=True,
    )
    if model.context_dim:
        params["cross_attention_dim"] = model.context_dim
    return dict(
        model=dict(target="pixelflow.model.PixelFlowModel", params=params),
        scheduler=dict(
            num_train_timesteps=1000, num_stages=config.cascade.num_stages, pyramid_shift=False
        ),
        data=dict(resolution=config.data.resolution),
    )


def official_files(source: epath.Path, config: str | None = None) -> tuple[epath.Path, epath.Path]:
    """Return (weights, config.yaml) of a folder, or of a weights file with a config beside it.

    Raises UserError if one is missing, or there are several weights files.
    """
    if not source.exists():
        raise UserError(f"{source} is not a folder, nor a file")
    weights, folder = source, source.parent
    if source.is_dir():
        folder = source
        names = files.list_files(source)
        found = [source / name for name in names if name.endswith(INDEX)][-1:]  # safetensors sort last
        found = found or [source / name for name in names if name.endswith(KINDS)]
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise UserError(f"{source} must hold one weights file, found {names}; name one")
        weights = found[0]
    yaml_path = epath.Path(config) if config else folder / CONFIG
    if not yaml_path.exists():
        raise UserError(f"{yaml_path} does not exist; name the official config with --config=FILE")
    return weights, yaml_path


def read_official(
    source: epath.PathLike, config: str | None = None, weights: str = "auto"
) -> tuple[Params, ConfigDict]:
    """Return our parameters and config from official ones.

    Args:
      source: a folder with one weights file and config.yaml, or the weights file.
      config: the config.yaml, if it is elsewhere.
      weights: which of several sets of weights (see `weights.find`).

    Raises UserError if a file is missing or unreadable, or an array is missing, unknown or misshapen.
    """
    path, yaml_path = official_files(epath.Path(source), config)
    with blame(f"{yaml_path} is not YAML", (yaml.YAMLError, ValueError, RecursionError)):
        values = yaml.safe_load(files.read_bytes(yaml_path))
    config = official_config(values)
    state = read_state(path, official_names(config).__contains__, weights)
    return from_official(state, config), config
