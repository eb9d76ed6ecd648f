"""Tokenizers: that of a T5 folder, or whole words for an encoder that is trained with the model."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from pixelflow_jax.common import UserError, blame, files, optional
from pixelflow_jax.models.t5 import SPECIAL

PAD, EOS, UNKNOWN = 0, 1, 2  # as in T5


class Tokens(NamedTuple):
    """Texts as token ids.

    Attributes:
      ids: each text ends with EOS and is padded with PAD.
      mask: True where there is no padding.
      cut: tokens of each text that did not fit.
    """

    ids: Int[np.ndarray, "n t"]
    mask: Bool[np.ndarray, "n t"]
    cut: Int[np.ndarray, " n"]

    def condition(self) -> dict[str, np.ndarray]:
        """Return the network's inputs (see models/conditioning.py)."""
        return {"text_ids": self.ids, "text_mask": self.mask}


class Tokenizer:
    """Maps texts to token ids; `word_tokenizer` and `read_tokenizer` make one."""

    def __init__(self, encode, vocab_size: int):
        self._encode, self.vocab_size = encode, vocab_size

    def __call__(self, texts: Sequence[str], max_length: int) -> Tokens:
        """Return at most `max_length` tokens per text, EOS included, padded to that length."""
        ids = np.full((len(texts), max_length), PAD, np.int32)
        cut, lengths = np.zeros((2, len(texts)), np.int32)
        for row, text in enumerate(texts):
            found = self._encode(text)
            cut[row] = max(len(found) + 1 - max_length, 0)
            found = [*found[: max_length - 1], EOS]
            ids[row, : len(found)], lengths[row] = found, len(found)
        return Tokens(ids, np.arange(max_length) < lengths[:, None], cut)


def _library():
    return optional("tokenizers", "text", "text")


def _of_library(tokenizer) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Tokenizer(functools.partial(_library_ids, tokenizer), tokenizer.get_vocab_size())


def _library_ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer with a token per word or punctuation mark of `words`, in any case."""
    library = _library()
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    model = library.models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN])
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = _into_words()
    return _of_library(tokenizer)


def distinct_words(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the words and punctuation marks of texts as `word_tokenizer` sees them, sorted."""
    normalizer, splitter = _into_words()
    found = {word for x in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(x))}
    return tuple(sorted(found.difference(SPECIAL)))


def _into_words():
    return _library().normalizers.Lowercase(), _library().pre_tokenizers.Whitespace()


def read_tokenizer(folder: epath.PathLike) -> Tokenizer:
    """Return the tokenizer of a T5 folder: tokenizer.json, or spiece.model.

    Raises UserError if neither is there, or it cannot be read.
    """
    names = files.list_files(folder)
    name = next((name for name in ("tokenizer.json", "spiece.model") if name in names), None)
    if name is None:
        raise UserError(f"{folder} holds no tokenizer: neither tokenizer.json nor spiece.model is there")
    path = epath.Path(folder) / name
    with blame(f"{path} is not a tokenizer"):  # both libraries raise bare exceptions
        data = files.read_bytes(path)
        if name == "tokenizer.json":
            return _of_library(_library().Tokenizer.from_str(data.decode()))
        sentencepiece = optional("sentencepiece", "text", "spiece.model")
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        return Tokenizer(functools.partial(processor.encode, out_type=int), processor.vocab_size())
