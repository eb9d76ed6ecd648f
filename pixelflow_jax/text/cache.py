"""A cache of text states, so that a frozen encoder sees each caption once.

It is a folder of safetensors shards with `keys` (uint64, of the texts), `ends` (of each text's states)
and `states` (bfloat16 as uint16 [all tokens, width], no padding), and manifest.json, which identifies
the encoder. A shard is written whole or not at all; a text in a shard is not encoded again.
"""

import bisect
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Float, Int
from tqdm import tqdm

from pixelflow_jax.common import UserError, blame, files
from pixelflow_jax.common.claims import Description, claim

MANIFEST = "manifest.json"
SHORTEST = 16  # least number of tokens that a text is padded to for encoding


def text_key(text: str) -> int:
    """Return 64 bits of a text's SHA-256: ten million texts collide in one of 370,000 caches."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class EmbeddingCache:
    """Text states by text.

    Raises UserError if the folder is not a cache, is not on a disk, or has states of another width or
    texts that were truncated to another length.
    """

    def __init__(self, path: str, width: int | None = None, max_length: int | None = None):
        self._path = path
        _check_local(path)
        self.manifest = files.read_json(epath.Path(path) / MANIFEST)
        if not isinstance(self.manifest, dict) or "width" not in self.manifest:
            raise UserError(f"{path}/{MANIFEST} is not the manifest of a cache of text states")
        if width not in (None, self.manifest["width"]):
            raise UserError(
                f"the cache {path} has states of {self.manifest['width']}, the model takes {width} "
                f"(config.model.context_dim)"
            )
        cut = self.manifest.get("max_length")
        if max_length not in (None, cut):
            raise UserError(
                f"the texts of the cache {path} were cut at {cut or 'another number of'} tokens, "
                f"config.text.max_length is {max_length}: encode again with --max_length={max_length} "
                f"into a new folder, or set config.text.max_length to the cache's"
            )
        self._shards = _shards(path)
        keys, places = [np.zeros(0, np.uint64)], [np.zeros((0, 3), np.int64)]
        for number, name in enumerate(self._shards):
            shard = _open(f"{path}/{name}")
            if set(shard.keys()) != {"keys", "ends", "states"}:
                raise UserError(f"{path}/{name} is not a shard of a cache of text states")
            keys.append(shard.get_tensor("keys"))
            ends = shard.get_tensor("ends")
            begins = np.concatenate([[0], ends[:-1]])
            places.append(np.stack([np.full_like(begins, number), begins, ends], axis=1))
        keys = np.concatenate(keys)
        order = np.argsort(keys)
        self._keys, self._places = keys[order], np.concatenate(places)[order]

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, text: str) -> bool:
        return self._find(text) is not None

    def __call__(self, text: str) -> Float[np.ndarray, "t c"]:
        """Return the states of a text, bfloat16. Raises UserError if the cache does not hold it."""
        found = self._find(text)
        if found is None:
            raise UserError(
                f"the cache {self._path} does not hold the text {text!r}; add it with python -m "
                f"pixelflow_jax.encode"
            )
        shard, begin, end = self._places[found].tolist()
        states = _open(f"{self._path}/{self._shards[shard]}").get_slice("states")[begin:end]
        return states.view(ml_dtypes.bfloat16)

    def padded(self, texts: Sequence[str], max_length: int) -> dict[str, np.ndarray]:
        """Return {"context": bfloat16 [n, max_length, c], "context_mask"}; truncate long texts."""
        width = self.manifest["width"]
        context = np.zeros((len(texts), max_length, width), ml_dtypes.bfloat16)
        mask = np.zeros((len(texts), max_length), bool)
        for row, text in enumerate(texts):
            states = self(text)[:max_length]
            context[row, : len(states)], mask[row, : len(states)] = states, True
        return {"context": context, "context_mask": mask}

    def _find(self, text: str) -> int | None:
        key = text_key(text)
        place = bisect.bisect_left(self._keys, key)
        return place if place < len(self._keys) and self._keys[place] == key else None


def _check_local(path: str) -> None:
    if files.is_remote(path):
        raise UserError(f"{path}: a cache of text states needs random access; copy it to a disk")


def _shards(path: str) -> list[str]:
    return [name for name in files.list_files(path) if name.endswith(".safetensors")]


@functools.lru_cache(maxsize=256)  # not a method, as loaders pickle their cache
def _open(path: str):
    from safetensors import safe_open

    with blame(f"{path} is not a shard of a cache of text states"):  # safetensors has its own errors
        return safe_open(path, framework="numpy")


def encode_texts(
    texts: Iterable[str],
    encode: Callable[[list[str]], list[Float[np.ndarray, "t c"]]],
    out: str,
    manifest: dict[str, Any],
    shard_size: int,
) -> tuple[int, int]:
    """Add texts to a cache; return how many texts it holds and how many were encoded.

    Texts that the cache in the folder `out` holds are skipped. `encode` returns the states of texts,
    without padding. `manifest` identifies the encoder, and must equal that of an existing cache. Raises
    UserError as `claim`, and if `out` is not on a disk.
    """
    from safetensors.numpy import save

    _check_local(out)
    with claim(out, Description(manifest, "states of another encoder or length", MANIFEST)):
        cache, taken = EmbeddingCache(out), _shards(out)
        missing = [text for text in dict.fromkeys(texts) if text not in cache]
        first = int(taken[-1].split(".")[0]) + 1 if taken else 0
        for begin in tqdm(range(0, len(missing), shard_size), unit="shard"):
            chosen = missing[begin : begin + shard_size]
            states = encode(chosen)
            shard = {
                "keys": np.array([text_key(text) for text in chosen], np.uint64),
                "ends": np.cumsum([len(x) for x in states], dtype=np.int64),
                "states": np.concatenate(states).astype(ml_dtypes.bfloat16).view(np.uint16),
            }
            name = f"{first + begin // shard_size:06d}.safetensors"
            files.write_bytes(epath.Path(out) / name, save(shard))
    return len(cache) + len(missing), len(missing)


def length_groups(lengths: Int[np.ndarray, " n"], batch: int, longest: int):
    """Yield (indices, length) of batches of texts of similar length: few shapes, little padding."""
    padded = np.minimum(SHORTEST * 2 ** np.ceil(np.log2(np.maximum(lengths / SHORTEST, 1))), longest)
    for length in np.unique(padded):
        places = np.flatnonzero(padded == length)
        for begin in range(0, len(places), batch):
            yield places[begin : begin + batch], int(length)
