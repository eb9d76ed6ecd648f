"""Encode captions once, so that training reads their states instead of running the text encoder.

    python -m pixelflow_jax.encode --config=configs/t2i_256.py --config.data.path=PICTURES \\
        --encoder=google/flan-t5-xl --out=states
    python -m pixelflow_jax.encode --captions=captions.txt --encoder=T5_FOLDER --out=states

Train with --config.text.cache=states. The cache always contains the empty text, which replaces dropped
captions. After an interruption, the same command continues; texts in the cache are not encoded again.
"""

import argparse
import hashlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from etils import epath

from pixelflow_jax.common import UserError, cli, files, log
from pixelflow_jax.config import default_config, parse_flags
from pixelflow_jax.data.sources import open_source
from pixelflow_jax.distributed import sharding
from pixelflow_jax.text.cache import encode_texts, length_groups
from pixelflow_jax.text.encoder import TextEncoder, encoder_folder, warn_of_cuts
from pixelflow_jax.text.tokenizer import read_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--config", help="config with a captioned data source")
    parser.add_argument("--captions", help="text file with one caption per line, instead of --config")
    parser.add_argument("--encoder", help="T5 folder or hub id (default: from the config)")
    parser.add_argument("--negative_prompt", action="append", default=[], help="a text to add")
    parser.add_argument("--max_length", type=int, help="token limit (default: from the config)")
    parser.add_argument("--batch_size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--shard_size", type=int, default=4096, help="texts per shard (%(default)s)")
    parser.add_argument("--out", required=True, help="cache folder: a new one, or one to extend")
    args, config = parse_flags(parser, argv)
    if (args.config is None) == (args.captions is None):
        raise UserError("give either --config or --captions")
    config = config or default_config()
    name, length = args.encoder or config.text.encoder, config.text.max_length
    length = length if args.max_length is None else args.max_length
    for flag in ("batch_size", "shard_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    if length < 2:
        raise UserError(f"--max_length must be at least 2, got {length}")
    folder = encoder_folder(name)
    mesh = sharding.make_mesh()
    tokenizer, encoder = read_tokenizer(folder), TextEncoder(name, mesh)
    size = -(-args.batch_size // mesh.size) * mesh.size

    seen, cuts = [], []  # of all texts, to warn only once

    def encode(texts: list[str]) -> list[np.ndarray]:
        tokens = tokenizer(texts, length)
        seen.extend(texts)
        cuts.extend(tokens.cut)
        states: list = [None] * len(texts)
        for places, padded in length_groups(tokens.mask.sum(axis=1), size, length):
            rows = np.resize(places, size)  # one shape per length
            found = encoder.condition(tokens.ids[rows, :padded], tokens.mask[rows, :padded])
            found = np.asarray(found["context"].astype(jnp.bfloat16))
            for row, place in enumerate(places):
                states[place] = found[row, : tokens.mask[place].sum()]
        return states

    manifest = {
        "encoder_sha256": encoder_hash(folder),
        "width": encoder.config.d_model,
        "max_length": length,
        "dtype": "bfloat16",
    }
    texts = ["", *args.negative_prompt, *all_captions(args, config)]
    held, new = encode_texts(texts, encode, args.out, manifest, args.shard_size)
    warn_of_cuts(seen, cuts, length, "caption")
    print(f"{new} texts encoded, {held} in the cache: {args.out}")


def all_captions(args: argparse.Namespace, config) -> Iterator[str]:
    """Yield every caption of the data source or of the file."""
    if args.captions is None:
        source = open_source(config.data)
        if not source.captioned:
            raise UserError(f"config.data.source={config.data.source} has no captions")
        for index in range(len(source)):
            try:
                yield from source.captions(index)
            except OSError as error:  # training replaces it too
                log.warning("skipped: %s: %s", source.name(index), error)
        return
    try:
        lines = files.read_lines(args.captions)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--captions={args.captions} is not a file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--captions={args.captions} is not UTF-8, nor UTF-16 with a byte-order mark: {error}"
        ) from None
    yield from (line.strip() for line in lines if line.strip())


def encoder_hash(folder: epath.Path) -> str:
    """Return the SHA-256 of an encoder's files: config, tokenizer, weights."""
    digest = hashlib.sha256()
    for name in files.list_files(folder):
        if name in ("config.json", "tokenizer.json", "spiece.model") or name.endswith(".safetensors"):
            digest.update(name.encode())
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    cli.run(main)
