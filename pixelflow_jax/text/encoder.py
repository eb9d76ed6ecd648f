"""Frozen text encoders: T5 folders as Hugging Face lays them out.

A folder holds config.json, tokenizer.json or spiece.model, and model.safetensors, or several such files
with model.safetensors.index.json.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int
from ml_collections import ConfigDict

from pixelflow_jax.common import UserError, files
from pixelflow_jax.distributed import sharding
from pixelflow_jax.foreign.weights import find
from pixelflow_jax.models.conditioning import Condition
from pixelflow_jax.models.t5 import T5Config, T5Encoder, known_names, t5_params
from pixelflow_jax.text.cache import EmbeddingCache
from pixelflow_jax.text.tokenizer import Tokenizer, read_tokenizer, word_tokenizer

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
HUB_FILES = (CONFIG, "*.safetensors", INDEX, "tokenizer.json", "spiece.model")
JOINT = "joint"  # value of config.text.encoder for an encoder that is trained with the model
KNOWN = tuple(f"google/flan-t5-{size}" for size in ("small", "base", "large", "xl", "xxl"))


def make_tokenizer(config: ConfigDict) -> Tokenizer:
    """Return the tokenizer of a config's text encoder, read once for all requests of a process."""
    return _tokenizer(config.text.encoder, tuple(config.text.words))


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str, words: tuple[str, ...]) -> Tokenizer:
    return word_tokenizer(words) if name == JOINT else read_tokenizer(encoder_folder(name))


def make_text_reader(config: ConfigDict) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """Return a function from texts to token ids with their mask, or to states from the cache."""
    length = config.text.max_length
    if config.text.cache:
        cache = EmbeddingCache(config.text.cache, config.model.context_dim, length)
        return functools.partial(cache.padded, max_length=length)
    return functools.partial(_token_ids, make_tokenizer(config), length)


def _token_ids(tokenizer: Tokenizer, length: int, texts: Sequence[str]) -> dict[str, np.ndarray]:
    return tokenizer(texts, length).condition()


def encoder_folder(name: str) -> epath.Path:
    """Return the folder itself or, for a hub id such as google/flan-t5-xl, the folder of its download.

    Raises UserError if there is no such folder and the hub does not have it either.
    """
    if not name:
        raise UserError(
            "this text model needs a text encoder: name a T5 folder or a hub id with "
            "--config.text.encoder (for `sample`, with --text_encoder)"
        )
    return files.folder_or_hub(name, "the text encoder", HUB_FILES)


def trusted_encoder(name: str, checkpoint: epath.PathLike) -> str:
    """Return the encoder that a checkpoint's config names, if it is safe to use.

    Safe are folders inside the checkpoint's, and KNOWN: a checkpoint from anywhere must not choose what
    is downloaded, or read with the user's rights. Raises UserError for any other; names the flag that
    allows it.
    """
    if name in ("", JOINT, *KNOWN):
        return name
    path = files.absolute(checkpoint)
    folders = [path]
    for depth, step in enumerate((path, path.parent)):  # the run's folder, if this is a step in it
        folders += [path.parents[depth]] if step.name == "checkpoints" else []
    for folder in map(str, folders):
        place = name if files.is_remote(name) else os.path.join(folder, name)
        if _real(place).startswith(_real(folder) + "/") and epath.Path(place).is_dir():
            return place
    raise UserError(
        f"--checkpoint={checkpoint} names {name} as its text encoder: neither a folder in it nor one of "
        f"{', '.join(KNOWN)}. To allow it, add --text_encoder={name}"
    )


def _real(path: str) -> str:
    """Resolve links and "..", so that prefixes tell what is inside what."""
    if not files.is_remote(path):
        return os.path.realpath(path)
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{os.path.normpath(rest)}"


class TextEncoder:
    """A frozen T5 on the devices of a mesh, from token ids to states.

    Attributes:
      config: sizes; `config.d_model` is the width of the states.
      params: split over the mesh by the rules of distributed/sharding.py.
    """

    def __init__(self, name: str, mesh: Mesh, dtype=jnp.bfloat16, width: int | None = None):
        """Read the T5 folder or hub id `name`. Raises UserError if its states are not `width` wide."""
        folder = encoder_folder(name)
        self.config = T5Config.from_json(files.read_json(folder / CONFIG), str(folder / CONFIG))
        if width is not None and self.config.d_model != width:
            raise UserError(
                f"the text encoder {name} has states of {self.config.d_model}, the model takes "
                f"{width} (config.model.context_dim)"
            )
        params = read_t5(folder, self.config, dtype)
        self.params = sharding.placed(params, sharding.shardings(params, mesh))
        self._encode = jax.jit(
            T5Encoder(self.config, dtype).apply, out_shardings=NamedSharding(mesh, sharding.BATCH)
        )

    def condition(self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Condition:
        """Return {"context": states [b, t, d], "context_mask"}; b is a multiple of the devices."""
        return {"context": self._encode({"params": self.params}, ids, mask), "context_mask": mask}


def read_t5(folder: epath.Path, config: T5Config, dtype) -> dict:
    """Return our parameters from a T5 folder.

    Raises UserError if weights are missing or unreadable, or do not fit config.json.
    """
    names = [name for name in (INDEX, WEIGHTS) if (folder / name).exists()]
    if not names:
        raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    found = find(folder / names[0], known_names(config).__contains__)
    return t5_params(lambda name: found[name](), found, config, str(folder), dtype)


def warn_of_cuts(
    texts: Sequence[str], cut: Sequence[int], max_length: int, what: str = "prompt"
) -> None:
    """Warn on stderr how many texts are truncated, and by how many tokens the longest is."""
    count = int(np.count_nonzero(cut))
    if not count:
        return
    longest = int(np.argmax(cut))
    text = texts[longest] if len(texts[longest]) <= 40 else texts[longest][:37] + "..."
    said = f"the {what} {text!r} is {cut[longest]} tokens longer than the limit of {max_length}"
    others = f", and {count - 1:,} more of {len(texts):,} are longer too: their ends are cut off"
    print(f"warning: {said}{others if count > 1 else ': its end is cut off'}", file=sys.stderr)
