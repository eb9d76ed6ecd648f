"""Text encoders that are not trained with the model: T5 folders, as Hugging Face lays them out.

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

from pixelflow_jax.common import files
from pixelflow_jax.common.errors import UserError
from pixelflow_jax.distributed import sharding
from pixelflow_jax.foreign.weights import find
from pixelflow_jax.models.conditioning import Condition
from pixelflow_jax.models.t5 import EMBED_NAMES, T5Config, T5Encoder, t5_params, weight_names
from pixelflow_jax.text.cache import EmbeddingCache
from pixelflow_jax.text.tokenizer import Tokenizer, read_tokenizer, word_tokenizer

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
HUB_FILES = (CONFIG, "*.safetensors", INDEX, "tokenizer.json", "spiece.model")
JOINT = "joint"  # config.text.encoder of an encoder that is trained with the model
KNOWN = tuple(f"google/flan-t5-{size}" for size in ("small", "base", "large", "xl", "xxl"))


def make_tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer of a config's text encoder."""
    if config.text.encoder == JOINT:
        return word_tokenizer(config.text.words)
    return read_tokenizer(encoder_folder(config.text.encoder))


def make_text_reader(config: ConfigDict) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """Texts to what the loader ships of them: token ids with their mask, or states from the cache."""
    length = config.text.max_length
    if config.text.cache:
        cache = EmbeddingCache(config.text.cache, config.model.context_dim, length)
        return functools.partial(cache.padded, max_length=length)
    return functools.partial(_token_ids, make_tokenizer(config), length)


def _token_ids(tokenizer: Tokenizer, length: int, texts: Sequence[str]) -> dict[str, np.ndarray]:
    return tokenizer(texts, length).condition()


def encoder_folder(name: str) -> epath.Path:
    """The folder itself, or, for a hub id such as google/flan-t5-xl, where its files were downloaded.

    Raises:
      UserError: if there is no such folder and the hub does not help either.
    """
    if not name:
        raise UserError(
            "this text model needs a text encoder: --config.text.encoder (or, of `sample`, "
            "--text_encoder) names a T5 folder or a hub id"
        )
    return files.folder_or_hub(name, "the text encoder", HUB_FILES)


def trusted_encoder(name: str, checkpoint: epath.PathLike) -> str:
    """The encoder that a checkpoint's own config names, which may come from anywhere.

    A folder inside the checkpoint's, or one of KNOWN; so no checkpoint chooses what is downloaded, or
    read with somebody's rights.

    Raises:
      UserError: for another; names the flag with which a person says so.
    """
    if name in ("", JOINT, *KNOWN):
        return name
    path = files.absolute(checkpoint)
    folders = [path]
    for depth, step in enumerate((path, path.parent)):  # the run's folder, if this is a step's in it
        folders += [path.parents[depth]] if step.name == "checkpoints" else []
    for folder in map(str, folders):
        place = os.path.join(folder, name) if "://" not in name else name
        if _real(place).startswith(_real(folder) + "/") and epath.Path(place).is_dir():
            return place
    raise UserError(
        f"--checkpoint={checkpoint} names {name} as its text encoder: no folder of its own, nor one of "
        f"{', '.join(KNOWN)}. If that is what you want: --text_encoder={name}"
    )


def _real(path: str) -> str:
    """A path without links and "..", by which to tell what is inside what."""
    scheme, mark, rest = path.rpartition("://")
    return f"{scheme}{mark}{os.path.normpath(rest)}" if mark else os.path.realpath(path)


class TextEncoder:
    """A frozen T5 on the devices of a mesh: token ids to states.

    Attributes:
      config: its sizes; `config.d_model` is the width of the states.
      params: split over the mesh by the rules of sharding.py.
    """

    def __init__(self, name: str, mesh: Mesh, dtype=jnp.bfloat16, width: int | None = None):
        """`width`: what the model takes (context_dim); raises UserError if the encoder has another."""
        folder = encoder_folder(name)
        self.config = T5Config.from_json(files.read_json(folder / CONFIG), str(folder / CONFIG))
        if width is not None and self.config.d_model != width:
            raise UserError(
                f"the text encoder {name} has states of {self.config.d_model}, the model takes "
                f"{width} (config.model.context_dim)"
            )
        params = read_t5(folder, self.config, dtype)
        where = sharding.shardings(params, mesh)
        self.params = jax.tree.map(
            lambda x, w: jax.make_array_from_callback(x.shape, w, lambda index: x[index]), params, where
        )
        self._encode = jax.jit(
            T5Encoder(self.config, dtype).apply, out_shardings=NamedSharding(mesh, sharding.BATCH)
        )

    def condition(self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> Condition:
        """{"context": states [b, t, d], "context_mask"}; b a multiple of the mesh's devices."""
        return {"context": self._encode({"params": self.params}, ids, mask), "context_mask": mask}


def read_t5(folder: epath.Path, config: T5Config, dtype) -> dict:
    """Our parameters from a T5 folder.

    Raises:
      UserError: if weights are missing, unreadable, or do not fit config.json.
    """
    names = [name for name in (INDEX, WEIGHTS) if (folder / name).exists()]
    if not names:
        raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    known = {name for _, _, name in weight_names(config)} | set(EMBED_NAMES)
    found = find(folder / names[0], known.__contains__)
    return t5_params(lambda name: found[name](), found, config, str(folder), dtype)


def warn_of_cuts(
    texts: Sequence[str], cut: Sequence[int], max_length: int, what: str = "prompt"
) -> None:
    """Says on stderr, in a line, how many texts lose their ends, and of the longest how many tokens."""
    count = int(np.count_nonzero(cut))
    if not count:
        return
    longest = int(np.argmax(cut))
    text = texts[longest] if len(texts[longest]) <= 40 else texts[longest][:37] + "..."
    said = f"the {what} {text!r} is {cut[longest]} tokens longer than the limit of {max_length}"
    if count > 1:
        said += f", and {count - 1:,} more of {len(texts):,} are longer too: their ends are cut off"
    else:
        said += ": its end is cut off"
    print(f"warning: {said}", file=sys.stderr)
