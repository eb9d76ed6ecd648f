"""Official PixelFlow weights to ours and back.

python -m pixelflow_jax.convert --source=OFFICIAL_DIR_FILE_OR_HUB_ID --out=DIR
python -m pixelflow_jax.convert --source=DIR --to=official --out=OFFICIAL_DIR
python -m pixelflow_jax.convert --source=pt_inception-2015-12-05-6726825d.pth --to=inception --out=DIR
"""

import argparse
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from pixelflow_jax import cli, files
from pixelflow_jax.config import build_model, check_config, default_config
from pixelflow_jax.errors import UserError, blame, optional
from pixelflow_jax.models.conditioning import TEXT, init_params
from pixelflow_jax.models.inception import inception_params
from pixelflow_jax.training.checkpoints import load_params, save_params

KINDS = (".pt", ".pth", ".bin", ".safetensors", ".npz")  # of weights files
Params = dict[str, Any]
State = dict[str, np.ndarray]  # the official state dict


class Rule(NamedTuple):
    """One official array: its name, our path, and how its axes go there and back."""

    official: str
    ours: tuple[str, ...]
    load: Callable[[np.ndarray], np.ndarray] = lambda x: x
    save: Callable[[np.ndarray], np.ndarray] = lambda x: x


def _dense(official: str, *ours: str) -> list[Rule]:
    return [
        Rule(f"{official}.weight", (*ours, "kernel"), np.transpose, np.transpose),
        Rule(f"{official}.bias", (*ours, "bias")),
    ]


def _attention(official: str, ours: str) -> list[Rule]:
    rules = [rule for name in "qkvo" for rule in _dense(f"{official}.{name}_proj", ours, name)]
    for name in ("q_norm", "k_norm"):
        rules.append(Rule(f"{official}.{name}.weight", (ours, name, "scale")))
    return rules


def _block_rules(text: bool) -> list[Rule]:
    """Names within `transformer_blocks.<i>` and within our stacked `blocks`."""
    rules = _dense("norm1.linear", "modulation") + _attention("attn1", "self_attention")
    if text:
        rules.append(Rule("norm2.weight", ("cross_norm", "scale")))
        rules += _attention("attn2", "cross_attention")
    rules.append(Rule("norm3.weight", ("mlp_norm", "scale")))
    return rules + _dense("mlp.fc1", "mlp_1") + _dense("mlp.fc2", "mlp_2")


def _outer_rules(patch_size: int, classes: bool) -> list[Rule]:
    """Everything outside the blocks. Their patches are (channel, row, column), ours channel last."""
    if not isinstance(patch_size, int):
        raise UserError(f"the official network has one patch size for all stages, not {patch_size}")

    def load_patch(x):  # [D, 3, p, p] -> [p * p * 3, D]
        return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

    def save_patch(x):
        return x.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1)

    rules = [
        Rule("patch_embed.proj.weight", ("patch_embed", "kernel"), load_patch, save_patch),
        Rule("patch_embed.proj.bias", ("patch_embed", "bias")),
    ]
    for official, ours in (("timestep_embedder", "time_embed"), ("latent_size_embedder", "size_embed")):
        rules += _dense(f"{official}.linear_1", ours, "linear_1")
        rules += _dense(f"{official}.linear_2", ours, "linear_2")
    if classes:
        name = "class_embedder.embedding_table.weight"
        rules.append(Rule(name, ("class_embed", "embedding")))
    return rules + _dense("proj_out_1", "head_modulation") + _dense("proj_out_2", "head")


def from_official(state: State, config: ConfigDict) -> Params:
    """Our parameters (float32) from an official state dict.

    Raises:
      UserError: names every key that is missing, left over, or of a wrong shape.
    """
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(build_model(config), 0)))
    left, params, problems = dict(state), {}, []
    model = config.model

    def take(name: str, rule: Rule, shape: tuple[int, ...]) -> np.ndarray | None:
        if name not in left:
            problems.append(f"missing: {name}")
            return None
        theirs = np.asarray(left.pop(name), np.float32)
        expected = rule.save(np.empty(shape, np.float32)).shape
        if theirs.shape != expected:
            problems.append(f"{name} has shape {theirs.shape}, the config needs {expected}")
            return None
        return rule.load(theirs)

    for rule in _outer_rules(model.patch_size, model.num_classes > 0):
        params[rule.ours] = take(rule.official, rule, shapes[rule.ours].shape)
    for rule in _block_rules(model.context_dim > 0):
        path = ("blocks", *rule.ours)
        names = [f"transformer_blocks.{i}.{rule.official}" for i in range(model.depth)]
        layers = [take(name, rule, shapes[path].shape[1:]) for name in names]
        params[path] = None if any(x is None for x in layers) else np.stack(layers)
    problems += [f"left over: {name}" for name in left]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if problems[8:] else "")
        raise UserError(f"the weights do not fit the config: {shown}")
    return unflatten_dict(params)


def to_official(params: Params, config: ConfigDict) -> State:
    """The official state dict (float32) from our parameters; a gate on cross-attention is folded in.

    Raises:
      UserError: if a text encoder is part of the model, which official weights have no place for.
    """
    if TEXT in params:
        raise UserError("this model has a text encoder of its own, which official weights cannot hold")
    model, state = config.model, {}
    ours = {path: np.asarray(x) for path, x in flatten_dict(params).items()}
    if model.context_dim and model.cross_gate:
        gate, last = ours["blocks", "cross_gate"], ("blocks", "cross_attention", "o")
        ours[*last, "kernel"] = ours[*last, "kernel"] * gate[:, None]
        ours[*last, "bias"] = ours[*last, "bias"] * gate
    for rule in _outer_rules(model.patch_size, model.num_classes > 0):
        state[rule.official] = rule.save(ours[rule.ours])
    for rule in _block_rules(model.context_dim > 0):
        for i, layer in enumerate(ours["blocks", *rule.ours]):
            state[f"transformer_blocks.{i}.{rule.official}"] = rule.save(layer)
    return {name: np.ascontiguousarray(array) for name, array in state.items()}


def official_config(values: dict[str, Any]) -> ConfigDict:
    """Our config from the contents of an official config.yaml.

    Raises:
      UserError: if a key is missing or the network is of a kind that was never released.
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
    """The contents of an official config.yaml from our config."""
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


def read_state(path: epath.Path, weights: str = "auto") -> State:
    """A state dict from .pt/.pth (weights only), .safetensors or .npz (no pickle).

    A training checkpoint holds several: `weights` picks "ema", "model", or "auto" (ema if there).

    Raises:
      UserError: for a file that cannot be read as what its name says.
    """
    with blame(f"{path} cannot be read as {path.suffix}"):  # each reader raises its own kinds
        if path.suffix == ".safetensors":
            from safetensors.flax import load  # unlike numpy's, reads bfloat16

            return {name: np.asarray(x) for name, x in load(files.read_bytes(path)).items()}
        if path.suffix == ".npz":
            with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        if path.suffix in (".pt", ".pth", ".bin"):
            return _read_torch(path, weights)
    raise UserError(f"{path}: expected a .pt, .pth, .bin, .safetensors or .npz file")


def _torch():
    return optional("torch", "convert", "a file of PyTorch's")


def _read_torch(path: epath.Path, weights: str) -> State:
    state = _torch().load(io.BytesIO(files.read_bytes(path)), map_location="cpu", weights_only=True)
    nested = [name for name in ("ema", "model") if isinstance(state.get(name), dict)]
    if nested:
        chosen = nested[0] if weights == "auto" else weights
        if chosen not in nested:
            raise UserError(f"{path} has no {weights} weights; it has {', '.join(nested)}")
        state = state[chosen]
    return {
        name.removeprefix("module."): tensor.float().numpy()
        if tensor.is_floating_point()
        else tensor.numpy()
        for name, tensor in state.items()
    }


def _official_files(source: epath.Path, config: str | None) -> tuple[epath.Path, epath.Path]:
    """(weights, config.yaml) of a folder, or of a weights file with a config beside it."""
    if not source.is_file():
        wanted = ("config.yaml", *(f"*{kind}" for kind in KINDS))
        source = files.folder_or_hub(str(source), "--source:", wanted)
    folder = source if source.is_dir() else source.parent
    weights = source
    if source.is_dir():
        found = [source / name for name in files.list_files(source) if name.endswith(KINDS)]
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise UserError(f"--source={source} must hold one weights file, found {names}; name one")
        weights = found[0]
    yaml_path = epath.Path(config) if config else folder / "config.yaml"
    if not yaml_path.exists():
        raise UserError(f"{yaml_path} does not exist; name the official config with --config=FILE")
    return weights, yaml_path


def read_official(
    source: epath.PathLike, config: str | None = None, weights: str = "auto"
) -> tuple[Params, ConfigDict]:
    """Our parameters and config from official ones.

    Args:
      source: a folder (or hub id) with one weights file and config.yaml, or the weights file.
      config: the config.yaml, if it is elsewhere.
      weights: "ema", "model", or "auto", for training checkpoints that hold both.

    Raises:
      UserError: if a file is missing or unreadable, or an array is missing, unknown or misshapen.
    """
    path, yaml_path = _official_files(epath.Path(source), config)
    with blame(f"{yaml_path} is not YAML", (yaml.YAMLError, ValueError, RecursionError)):
        values = yaml.safe_load(files.read_bytes(yaml_path))
    config = official_config(values)
    return from_official(read_state(path, weights), config), config


def _import_official(args: argparse.Namespace) -> str:
    params, config = read_official(args.source, args.config, args.weights)
    save_params(args.out, params, config)
    return f"{_count(params)} parameters"


def _export_official(args: argparse.Namespace) -> str:
    params, config, _ = load_params(args.source)
    state = to_official(jax.device_get(params), config)
    out = epath.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.format == "safetensors":
        from safetensors.numpy import save

        data = save(state)
    else:
        buffer = io.BytesIO()
        if args.format == "npz":
            np.savez(buffer, **state)
        else:
            torch = _torch()
            torch.save({name: torch.from_numpy(array) for name, array in state.items()}, buffer)
        data = buffer.getvalue()
    files.write_bytes(out / f"model.{args.format}", data)
    text = yaml.safe_dump(official_yaml(config), sort_keys=False)
    files.write_bytes(out / "config.yaml", text.encode())
    return f"{len(state)} arrays, {_count(params)} parameters"


def _import_inception(args: argparse.Namespace) -> str:
    """FID's Inception-v3 as safetensors, by its public names, so that evaluate needs no torch."""
    source = epath.Path(args.source)
    if not source.is_file():
        raise UserError(f"--source={source} is not a file; give the public .pth")
    state = read_state(source)
    params = inception_params(state)
    from safetensors.numpy import save

    out = epath.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: np.ascontiguousarray(array) for name, array in state.items()}
    files.write_bytes(out / "inception.safetensors", save(kept))
    return f"{_count(params)} parameters of FID's Inception-v3"


def _count(params: Params) -> str:
    return f"{sum(x.size for x in jax.tree.leaves(params)):,}"


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--source", required=True, help="official folder, weights file or hub id; or ours"
    )
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    parser.add_argument(
        "--to",
        choices=("ours", "official", "inception"),
        default="ours",
        help="what to write (default: %(default)s); inception: FID's network",
    )
    parser.add_argument("--config", help="official config.yaml, if it is not beside the weights")
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "model"),
        default="auto",
        help="which weights of an official training checkpoint; auto prefers ema",
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "npz", "pt"),
        default="safetensors",
        help="file to write with --to=official",
    )
    args = parser.parse_args(argv)
    if files.list_files(args.out):
        raise UserError(f"--out={args.out} holds files already; name a new folder")
    ways = {"ours": _import_official, "official": _export_official, "inception": _import_inception}
    report = ways[args.to](args)
    print(f"Converted {report}: {args.out}")


if __name__ == "__main__":
    cli.run(main)
