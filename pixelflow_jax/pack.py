"""Packs a folder of images or a TFDS dataset into ArrayRecord shards, which read fast anywhere.

    python -m pixelflow_jax.pack --source=folder --path=imagenet/train --out=packed/train
    python -m pixelflow_jax.pack --source=tfds --name=imagenet2012 --split=train --out=packed/train

Images are stored as they are, still encoded. Train on them with --config.data.source=array_record
--config.data.path=packed/train. A packing that was stopped goes on when it is started again.
"""

import sys

from tqdm import tqdm

from pixelflow_jax.common import cli, locks
from pixelflow_jax.common.errors import UserError
from pixelflow_jax.config import default_config
from pixelflow_jax.data import records
from pixelflow_jax.data.sources import open_source


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--source",
        default="folder",
        help="folder, caption_folder, webdataset, tfds or idx (default: %(default)s)",
    )
    parser.add_argument("--path", default="", help="the folder, or TFDS's data_dir")
    parser.add_argument("--name", default="", help="the TFDS dataset")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--out", required=True, help="folder for the shards; local or gs://")
    parser.add_argument("--shard_size", type=int, default=10_000, help="images a shard")
    args = parser.parse_args(argv)
    if args.shard_size < 1:
        raise UserError(f"--shard_size must be at least 1, got {args.shard_size}")
    data = default_config().data
    data.update(source=args.source, path=args.path, name=args.name, split=args.split)
    data.crop = "center"  # images of any size
    source = open_source(data)

    def progress(shards):
        return tqdm(shards, unit="shard", file=sys.stderr)

    origin = dict(source=args.source, path=args.path, name=args.name, split=args.split)
    with locks.held(args.out, "--out"):
        written = records.pack(source, args.out, args.shard_size, origin, progress)
    kind = "with captions" if getattr(source, "captioned", False) else f"of {source.num_classes} classes"
    print(f"{len(source)} images {kind}, {written} shards written: {args.out}")


if __name__ == "__main__":
    cli.run(main)
