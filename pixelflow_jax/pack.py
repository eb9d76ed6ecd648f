"""Convert a folder of images or a TFDS dataset to ArrayRecord shards, which are fast to read anywhere.

    python -m pixelflow_jax.pack --source=folder --path=imagenet/train --out=packed/train
    python -m pixelflow_jax.pack --source=tfds --name=imagenet2012 --split=train --out=packed/train

Images keep their encoding. To train on the shards, pass --config.data.source=array_record
--config.data.path=packed/train. After an interruption, the same command continues.
"""

from pixelflow_jax.common import UserError, cli
from pixelflow_jax.config import default_config
from pixelflow_jax.data import records
from pixelflow_jax.data.sources import open_source


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--source",
        default="folder",
        help="folder, caption_folder, webdataset, tfds or idx (default: %(default)s)",
    )
    parser.add_argument("--path", default="", help="data folder, or TFDS's data_dir")
    parser.add_argument("--name", default="", help="name of the TFDS dataset")
    parser.add_argument("--split", default="train", help="TFDS split (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder to write, local or gs://")
    parser.add_argument("--shard_size", type=int, default=10_000, help="images per shard (%(default)s)")
    args = parser.parse_args(argv)
    if args.shard_size < 1:
        raise UserError(f"--shard_size must be at least 1, got {args.shard_size}")
    data = default_config().data
    origin = dict(source=args.source, path=args.path, name=args.name, split=args.split)
    data.update(origin)
    data.crop = "center"  # images of any size
    source = open_source(data)
    written = records.pack(source, args.out, args.shard_size, origin)
    kind = "with captions" if source.captioned else f"of {source.num_classes} classes"
    print(f"{len(source)} images {kind}, {written} shards written: {args.out}")


if __name__ == "__main__":
    cli.run(main)
