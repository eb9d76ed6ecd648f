"""Encodes captions once, so that training reads their states instead of running the text encoder.

    python -m pixelflow_jax.encode --config=configs/t2i_256.py --config.data.path=PICTURES \\
        --encoder=google/flan-t5-xl --out=states
    python -m pixelflow_jax.encode --captions=captions.txt --encoder=T5_FOLDER --out=states

Train with --config.text.cache=states. The empty text, which stands in for dropped captions, is always
among them. A run that was stopped goes on; texts that the cache holds are not encoded again.
"""

import argparse
import functools
import hashlib
import logging
import sys
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from pixelflow_jax.common import cli, files, locks
from pixelflow_jax.common.errors import UserError
from pixelflow_jax.config import default_config, parse_flags
from pixelflow_jax.data.sources import captions_at, open_source
from pixelflow_jax.distributed import sharding
from pixelflow_jax.text.cache import encode_texts, length_groups
from pixelflow_jax.text.encoder import TextEncoder, encoder_folder, warn_of_cuts
from pixelflow_jax.text.tokenizer import read_tokenizer

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--config", help="config whose data source has the captions")
    parser.add_argument("--captions", help="or a text file with a caption a line")
    parser.add_argument("--encoder", help="T5 folder or hub id (default: the config's)")
    parser.add_argument("--negative_prompt", action="append", default=[], help="texts to add")
    parser.add_argument("--max_length", type=int, help="tokens (default: the config's)")
    parser.add_argument("--batch_size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--shard_size", type=int, default=4096, help="texts (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder of the cache: new, or one to add to")
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

    seen, cuts = [], []  # of all texts, to warn once

    def encode(texts: list[str]) -> list[np.ndarray]:
        tokens = tokenizer(texts, length)
        seen.extend(texts)
        cuts.extend(tokens.cut)
        states: list = [None] * len(texts)
        for places, padded in length_groups(tokens.mask.sum(axis=1), size, length):
            rows = np.resize(places, size)  # one shape a length
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
    progress = functools.partial(tqdm, unit="shard", file=sys.stderr)
    with locks.held(args.out, "--out"):
        held, new = encode_texts(texts, encode, args.out, manifest, args.shard_size, progress)
    warn_of_cuts(seen, cuts, length, "caption")
    print(f"{new} texts encoded, {held} in the cache: {args.out}")


def all_captions(args: argparse.Namespace, config) -> Iterator[str]:
    """Every caption of the data source, or of the file."""
    if args.captions is None:
        source = open_source(config.data)
        if not getattr(source, "captioned", False):
            raise UserError(f"config.data.source={config.data.source} has no captions")
        for index in range(len(source)):
            try:
                yield from captions_at(source, index)
            except OSError as error:  # training replaces it, too
                log.warning("left out: %s: %s", source.name(index), error)
        return
    try:
        lines = files.read_lines(args.captions)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--captions={args.captions} is not a file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--captions={args.captions} is not UTF-8, nor UTF-16 with its mark: {error}"
        ) from None
    yield from (line.strip() for line in lines if line.strip())


def encoder_hash(folder: epath.Path) -> str:
    """SHA-256 of an encoder's files: config, tokenizer, weights."""
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
