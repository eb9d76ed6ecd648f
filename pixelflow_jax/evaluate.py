"""Judge samples against a reference: FID, sFID, Inception Score, precision and recall.

    python -m pixelflow_jax.evaluate --samples=fifty --reference=VIRTUAL_imagenet256_labeled.npz \\
        --inception=pt_inception-2015-12-05-6726825d.pth --out=metrics.json
    python -m pixelflow_jax.evaluate --samples=samples --reference=configs/digits.py --features=pca \\
        --out=metrics.json
    python -m pixelflow_jax.evaluate --sweep --checkpoint=runs/digits --reference=configs/digits.py \\
        --features=pca --solver=euler,ab2 --num_steps=5,10,20 --out=runs/sweep

Samples are a folder that `sample` wrote, any folder of images, or an npz file (arr_0, as ADM's evaluator
reads it). A reference may also be ADM's statistics (mu, sigma, mu_s, sigma_s), a file of --save_stats,
or a config, which stands for its held-out images. Without Inception's weights, --features=pca compares
principal components of pixels, and says so. All devices and hosts take part.
"""

import argparse
import sys
from collections.abc import Callable

import jax
from etils import epath

from pixelflow_jax.common import UserError, arrays, cli, files
from pixelflow_jax.common.config_keys import check
from pixelflow_jax.config import default_config
from pixelflow_jax.distributed.watchdog import joined
from pixelflow_jax.evaluation import sweep
from pixelflow_jax.evaluation.judge import USUAL, Reference
from pixelflow_jax.evaluation.sets import open_images

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    _check(args)
    with joined(default_config().hosts, patient=True, flags=vars(args)) as watch:
        report = run(args, watch)
    if jax.process_index() == 0:
        print(report)


def run(args: argparse.Namespace, watch: Callable[[str], None]) -> str:
    """Do what the flags ask for; return the line to report."""
    if args.sweep and jax.process_count() > 1:
        raise UserError("--sweep runs in one process; sample and evaluate each run on many")
    cells = sweep.cells(args) if args.sweep else {}  # bad flags before the reference is read
    samples = open_images(args.samples, "samples", args.resolution) if args.samples else None
    inception = args.inception if args.features == "inception" else None
    reference = Reference(args.reference, inception, args.batch_size, args.resolution, watch)
    if args.sweep:
        return sweep.run(args, cells, reference)
    if args.save_stats and jax.process_index() == 0:
        arrays.write_npz(args.save_stats, reference.statistics)
    if samples is None:
        return f"Wrote the statistics of {args.reference}: {args.save_stats}"
    result = reference.judge(samples)
    if jax.process_index() != 0:
        return ""
    if args.features == "inception" and samples.count < USUAL:
        print(
            f"note: FID grows as samples get fewer; published numbers use {USUAL:,}, this one "
            f"{samples.count:,}",
            file=sys.stderr,
        )
    files.write_json(args.out, result)
    numbers = ", ".join(f"{name} {x:.4g}" for name, x in result.items() if isinstance(x, float))
    return f"{numbers} ({samples.count} samples): {args.out}"


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not fit together."""
    for name in ("batch_size", "resolution"):
        if (value := getattr(args, name)) is not None:
            check(f"--{name}", value, "[1, inf)")
    if args.features == "inception":
        if args.inception is None:
            raise UserError(
                f"FID needs the weights of its Inception-v3: --inception=FILE, from {INCEPTION_URL}; "
                f"--features=pca does without, under another name"
            )
        if not epath.Path(args.inception).exists():
            raise UserError(f"--inception={args.inception} does not exist")
    if args.save_stats and (args.sweep or args.features == "pca"):
        raise UserError(
            "--save_stats keeps Inception's statistics; leave out --sweep, and --features=pca"
        )
    if args.sweep:
        if not args.checkpoint or not args.out:
            raise UserError("--sweep needs --checkpoint and --out (a folder)")
        if args.samples:
            raise UserError("--sweep makes its own samples; leave --samples out")
        return
    given = [n for n in (*sweep.AXES, "checkpoint") if getattr(args, n) is not None]
    if given:
        raise UserError(f"--{given[0]} goes with --sweep")
    if not args.samples and not args.save_stats:
        raise UserError("name what to judge with --samples, or what to write with --save_stats")
    if args.samples and not args.out:
        raise UserError("name the file to write with --out, such as --out=metrics.json")
    if args.out and epath.Path(args.out).is_dir():
        raise UserError(f"--out={args.out} is a folder; name a file")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--samples", help="folder or npz file of the images to evaluate")
    add("--reference", required=True, help="folder, npz of images or statistics, or a config")
    add("--out", help="JSON file to write; with --sweep a folder")
    add("--features", choices=("inception", "pca"), default="inception", help="default: %(default)s")
    add("--inception", help="weights of FID's Inception-v3: .pth, .safetensors or .npz")
    add("--batch_size", type=int, default=50, help="images at a time (default: %(default)s)")
    add("--resolution", type=int, help="crop the images of a folder to this square, as ADM does")
    add("--save_stats", help="npz file for the reference's statistics")
    add("--sweep", action="store_true", help="sample and evaluate all combinations of the lists below")
    add("--checkpoint", help="checkpoint for the sweep")
    add("--guidance_scale", help="a list, as are all flags below: 1,1.5,2")
    add("--ema", help="EMA decays; 0 = raw parameters")
    add("--solver", help="solver names")
    add("--num_steps", help="steps per stage")
    add("--num_images", type=int, help="samples per combination (default: 1000)")
    return parser


if __name__ == "__main__":
    cli.run(main)
