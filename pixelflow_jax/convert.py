"""Convert official PixelFlow weights to our checkpoints and back; export samplers.

python -m pixelflow_jax.convert --source=OFFICIAL_DIR_FILE_OR_HUB_ID --out=DIR
python -m pixelflow_jax.convert --source=DIR --to=official --out=OFFICIAL_DIR
python -m pixelflow_jax.convert --source=DIR --lora=ADAPTERS --out=MERGED
python -m pixelflow_jax.convert --source=DIR --to=stablehlo --platforms=cpu,cuda,tpu --out=DIR2
python -m pixelflow_jax.convert --source=pt_inception-2015-12-05-6726825d.pth --to=inception --out=DIR
"""

import argparse
import io
from typing import Any

import jax
import numpy as np
import yaml
from etils import epath

from pixelflow_jax.common import UserError, cli, files
from pixelflow_jax.foreign.official import official_yaml, read_official, to_official
from pixelflow_jax.foreign.released import class_names, find_official
from pixelflow_jax.foreign.weights import load_torch, read_state
from pixelflow_jax.models.inception import inception_names, inception_params
from pixelflow_jax.requests.export import write_export
from pixelflow_jax.requests.request import fill
from pixelflow_jax.training.adapters import load_with_adapters
from pixelflow_jax.training.checkpoints import load_params, save_params

SAMPLER = ("ema", "height", "width", "dtype", "solver", "step_control", "num_steps", "grid", "shift")
SAMPLER += ("guidance_scale", "guidance_schedule", "guidance_interval")


def _merge_adapters(args: argparse.Namespace) -> str:
    params, config, meta = load_with_adapters(args.source, args.lora, args.lora_scale)
    save_params(args.out, params, config, meta.get("classes"))
    return f"{_count(params)} parameters, adapters included"


def _import_official(args: argparse.Namespace) -> str:
    if args.lora is not None:
        return _merge_adapters(args)
    source = find_official(args.source) or args.source
    params, config = read_official(source, args.config, args.weights)
    save_params(args.out, params, config, class_names(config))
    return f"{_count(params)} parameters"


def _export_official(args: argparse.Namespace) -> str:
    params, config, _ = load_params(args.source)
    state = to_official(jax.device_get(params), config)
    out = epath.Path(args.out)
    if args.format == "safetensors":
        from safetensors.numpy import save

        data = save(state)
    else:
        buffer = io.BytesIO()
        if args.format == "npz":
            np.savez(buffer, **state)
        else:
            torch = load_torch()
            torch.save({name: torch.from_numpy(array) for name, array in state.items()}, buffer)
        data = buffer.getvalue()
    files.write_bytes(out / f"model.{args.format}", data)
    text = yaml.safe_dump(official_yaml(config), sort_keys=False)
    files.write_bytes(out / "config.yaml", text.encode())
    return f"{len(state)} arrays, {_count(params)} parameters"


def _import_inception(args: argparse.Namespace) -> str:
    """Save FID's Inception-v3 as safetensors with its public names, so that evaluate needs no torch."""
    source = epath.Path(args.source)
    if not source.is_file():
        raise UserError(f"--source={source} is not a file; pass the public .pth")
    state = read_state(source, inception_names().__contains__, args.weights)
    params = inception_params(state)
    from safetensors.numpy import save

    out = epath.Path(args.out)
    kept = {name: np.ascontiguousarray(array) for name, array in state.items()}
    files.write_bytes(out / "inception.safetensors", save(kept))
    return f"{_count(params)} parameters of FID's Inception-v3"


def _export_sampler(args: argparse.Namespace) -> str:
    given = {name: getattr(args, name) for name in SAMPLER}
    request = fill(checkpoint=args.source, batch_size=args.batch_size, **given)
    platforms = [name.strip() for name in args.platforms.split(",")]
    return write_export(request, platforms, request.batch_size or 8, args.out)


def _count(params: dict[str, Any]) -> str:
    return f"{sum(x.size for x in jax.tree.leaves(params)):,}"


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--source", required=True, help="official folder, weights file or hub id; or our checkpoint"
    )
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    parser.add_argument(
        "--to",
        choices=("ours", "official", "stablehlo", "inception"),
        default="ours",
        help="format to write (default: %(default)s); stablehlo: the sampler, for jax without this "
        "package; inception: the network for FID",
    )
    parser.add_argument("--config", help="official config.yaml, if it is not beside the weights")
    parser.add_argument(
        "--weights",
        default="auto",
        help="one of several sets of weights, such as model; auto: the only one, or the average",
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "npz", "pt"),
        default="safetensors",
        help="file format for --to=official (default: %(default)s)",
    )
    parser.add_argument("--lora", help="workdir of adapters to add to the checkpoint --source")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="their weight")
    parser.add_argument("--platforms", default="cpu", help="of stablehlo, such as cpu,cuda,tpu")
    parser.add_argument("--batch_size", help="of stablehlo: images per call (default: 8)")
    for name in SAMPLER:
        parser.add_argument(f"--{name}", help="of stablehlo, as for `sample`")
    args = parser.parse_args(argv)
    if files.list_files(args.out):
        raise UserError(f"--out={args.out} already holds files; use a new folder")
    ways = {
        "ours": _import_official,
        "official": _export_official,
        "stablehlo": _export_sampler,
        "inception": _import_inception,
    }
    report = ways[args.to](args)
    print(f"Converted {report}: {args.out}")


if __name__ == "__main__":
    cli.run(main)
