"""Generates images from a checkpoint.

    python -m pixelflow_jax.sample --checkpoint=runs/digits --out=samples
    python -m pixelflow_jax.sample --checkpoint=runs/digits --labels=3,7 --num_images=20 --out=sevens

Writes 000000.png ..., grid.png, samples.npz (arr_0: uint8 [N, H, W, 3]; labels) and settings.json.
Image i depends on the seed, its number and its label. A folder that holds files is refused, except
one whose settings.json equals the request: that one is completed.
"""

import argparse
import io
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from pixelflow_jax import cli, files
from pixelflow_jax.errors import UserError
from pixelflow_jax.sampling import grids, guidance, solvers
from pixelflow_jax.sampling.generate import (
    build_sampler,
    image_keys,
    make_generate,
    save_grid,
    save_png,
)
from pixelflow_jax.training.checkpoints import load_params

# Flags that replace a key of config.sample; without them the checkpoint's own config decides.
FROM_CONFIG = ("solver", "num_steps", "grid", "shift", "guidance_scale", "guidance_schedule")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = _parser().parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, got {args.batch_size}")
    params, config, meta = load_params(args.checkpoint, args.ema)
    for name in FROM_CONFIG:
        if getattr(args, name) is not None:
            config.sample[name] = getattr(args, name)
    labels = _labels(args, config)
    sampler = build_sampler(config, args.height, args.width, args.dtype)
    settings = {
        "checkpoint": str(epath.Path(args.checkpoint).absolute()),
        "step": meta["step"],
        "ema": meta["ema"],
        "height": sampler.height,
        "width": sampler.width,
        "dtype": args.dtype or config.dtype,
        "seed": args.seed,
        **{name: config.sample[name] for name in FROM_CONFIG},
        "labels": labels.tolist(),
    }
    settings["num_steps"] = list(settings["num_steps"])
    out = _claim_folder(args.out, settings)

    paths = [out / f"{i:06d}.png" for i in range(len(labels))]
    size = (sampler.height, sampler.width, 3)
    missing = [i for i, path in enumerate(paths) if _read_png(path, size) is None]
    generate = make_generate(sampler)
    with tqdm(total=len(missing), unit="image", dynamic_ncols=True) as bar:
        for begin in range(0, len(missing), args.batch_size):
            chosen = missing[begin : begin + args.batch_size]
            padded = np.resize(chosen, args.batch_size)  # one shape, so one compilation
            keys = image_keys(args.seed, jnp.asarray(padded))
            pixels, finite = jax.device_get(generate(params, keys, jnp.asarray(labels[padded])))
            if not finite.all():
                sys.exit(
                    f"error: image {padded[np.argmin(finite)]} is not finite; those before it are in "
                    f"{out}. Try --dtype=float32, another --solver or more --num_steps; if nothing "
                    f"helps, the weights of --checkpoint={args.checkpoint} are broken"
                )
            for i, image in zip(chosen, pixels, strict=False):
                save_png(paths[i], image)
            bar.update(len(chosen))

    pixels = np.stack([_read_png(path, size) for path in paths])
    save_grid(out / "grid.png", pixels)
    with files.atomic_path(out / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=pixels, labels=labels)
    print(
        f"Wrote {len(missing)} images ({len(paths)} in all), step {meta['step']}, "
        f"guidance {config.sample.guidance_scale}: {out / 'grid.png'}"
    )


def _read_png(path: epath.Path, size: tuple[int, int, int]) -> np.ndarray | None:
    """The pixels of an image that is there and whole, else None: then it is drawn (again)."""
    if not path.exists():
        return None
    try:
        pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files
        return None
    return pixels if pixels.shape == size else None


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="workdir of a run, or a folder that convert wrote")
    add("--out", required=True, help="folder to write")
    add("--labels", help="classes, such as 0,1,2; repeated to fill num_images (default: all in turn)")
    add("--num_images", type=int, help="how many (default: one a label, or the config's number)")
    add("--batch_size", type=int, default=25, help="images at a time (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--ema", type=float, help="decay of the average to use; 0 = the raw parameters")
    add("--height", type=int, help="in pixels (default: as trained)")
    add("--width", type=int, help="in pixels (default: as trained)")
    add("--dtype", choices=("float32", "bfloat16"), help="of computation (default: as trained)")
    add("--solver", choices=solvers.SOLVERS, help="default: the config's, as for all below")
    add("--num_steps", type=_numbers, help="steps a stage: 10, or 10,10,10,10 with one each")
    add("--grid", choices=grids.KINDS, help="where the steps stand; reference: the official grid")
    add("--shift", type=float, help="above 1: more steps near the noise")
    add("--guidance_scale", type=float, help="weight of the last stage; 0 or less: no guidance")
    add("--guidance_schedule", choices=guidance.SCHEDULES, help="weight over the stages")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def _labels(args: argparse.Namespace, config: ConfigDict) -> np.ndarray:
    """The label of every image. Raises UserError for one that the model does not have."""
    classes = config.model.num_classes
    if not classes:
        raise UserError(
            f"--checkpoint={args.checkpoint} is a text model; sampling from prompts is not here yet"
        )
    if args.num_images is not None and args.num_images < 1:
        raise UserError(f"--num_images must be at least 1, got {args.num_images}")
    if args.labels is None:
        count = args.num_images or config.sample.num_images
        return np.arange(count, dtype=np.int32) % classes
    try:
        labels = _numbers(args.labels)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--labels: {error}") from None
    for label in labels:
        if not 0 <= label < classes:
            raise UserError(
                f"--labels={args.labels}: {label} is not a class; they are 0 to {classes - 1}"
            )
    return np.resize(np.array(labels, np.int32), args.num_images or len(labels))


def _claim_folder(out: str, settings: dict) -> epath.Path:
    """Makes the output folder, or takes one that an equal request began."""
    folder = epath.Path(out)
    path = folder / "settings.json"
    if files.list_files(folder):
        if not path.exists():
            raise UserError(f"--out={out} holds other files; name a new or empty folder")
        old = files.read_json(path)
        changed = [name for name in settings if old.get(name) != settings[name]]
        if changed:
            raise UserError(
                f"--out={out} holds samples of another request ({', '.join(changed)} differ); name a "
                f"new folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, settings)
    return folder


if __name__ == "__main__":
    cli.run(main)
