"""Captioned images: folders (Hugging Face's ImageFolder convention) and WebDataset tar shards.

A captioned Source (see sources.py) gives (encoded image, captions): of several, each step draws one.
"""

import collections
import itertools
import json
import os
from collections.abc import Callable

from etils import epath

from pixelflow_jax.common import files
from pixelflow_jax.common.errors import UserError
from pixelflow_jax.data import tars
from pixelflow_jax.data.names import LISTED, Finder, Strings, pair, say_beside, split_root
from pixelflow_jax.data.pixels import is_image, kinds_left_out, report_left_out
from pixelflow_jax.data.texts import METADATA, captions_of, decode_captions, read_metadata, some

GAP = 2**16  # bytes between an image and its caption in a tar, up to which both are read at once


class CaptionFolder:
    """Images anywhere below a folder, with their captions.

    Either metadata.jsonl beside the images or above, a line each: {"file_name": "a.png", "text": "..."},
    or metadata.csv with such columns, or for each image NAME.txt (see `pair`), with a caption a line.

    Raises:
      UserError: if an image has no caption, or the metadata are not what they should be.
    """

    captioned, num_classes = True, 0

    def __init__(self, path: str, split: str):
        self.root = split_root(path, split)
        folders = files.walk(self.root)
        images = [[x for name in names if is_image(x := f"{where}{name}")] for where, names in folders]
        told = self._told([(where, {*METADATA} & {*names}) for where, names in folders], images)
        texts, bare, beside, others = {}, [], set(), collections.Counter()
        for (where, names), here in zip(folders, images, strict=True):
            here = [name for name in here if name not in told]
            captions = [f"{where}{name}" for name in names if name.lower().endswith(".txt")]
            rest = {f"{where}{name}" for name in names if name not in METADATA}.difference(captions)
            others.update(kinds_left_out(rest))
            found = pair(here, captions)
            texts |= found[0]
            bare += found[1]
            beside.update(found[2])
        names = [name for name in itertools.chain.from_iterable(images) if name not in beside]
        if bare:
            raise UserError(
                f"{self.root}: {len(bare)} of {len(names)} images have no caption (a line in "
                f"{' or '.join(METADATA)}, or NAME.txt): {', '.join(bare[:LISTED])}"
            )
        report_left_out(self.root, others)
        say_beside(self.root, sorted(beside))
        self._names = Strings(names)
        # Of each a list in JSON, or a file's name, or nothing for NAME.txt
        self._captions = Strings(
            json.dumps(told[name]) if name in told else _other_name(name, texts[name]) for name in names
        )

    def _told(self, folders: list[tuple[str, set]], images: list[list[str]]) -> dict[str, tuple]:
        """What the metadata in these folders say of the images."""
        folders, found = [x for x in folders if x[1]], collections.defaultdict(tuple)
        find = Finder(itertools.chain.from_iterable(images)) if folders else None
        for folder, there in folders:
            missing = []
            if len(there) > 1:
                raise UserError(f"{self.root}/{folder} holds {' and '.join(METADATA)}: keep one of them")
            for asked, captions in read_metadata(f"{self.root}/{folder}{there.pop()}"):
                name = find(f"{folder}{asked}")
                if name is None:
                    missing.append(asked)
                else:
                    found[name] += captions
            if missing:
                raise UserError(
                    f"{self.root}/{folder}: the metadata names {folder}{min(missing)}, which is not "
                    f"there{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}"
                )
        return found

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[bytes, tuple[str, ...]]:
        with files.reading():
            return files.read_bytes(self.name(index)), self.captions(index)

    def head(self, index: int, size: int) -> bytes:
        """The first bytes of an image."""
        return files.read_bytes(self.name(index), 0, size)

    def captions(self, index: int) -> tuple[str, ...]:
        """Those of example `index`, without its image."""
        known = self._captions[index]
        if known.startswith("["):
            return some(json.loads(known))
        text = f"{self.root}/{known[1:] or os.path.splitext(self._names[index])[0] + '.txt'}"
        return decode_captions(files.read_bytes(text), text)

    def name(self, index: int) -> str:
        return f"{self.root}/{self._names[index]}"

    def digest(self) -> str:
        """Of the images' names."""
        return self._names.digest()


def _other_name(image: str, text: str) -> str:
    return "" if text == f"{os.path.splitext(image)[0]}.txt" else f"={text}"


class TarSource:
    """WebDataset shards: the members KEY.jpg (or another image) and KEY.txt or KEY.json of *.tar files.

    KEY is the path up to the last dot (see `pair`). Examples are read by their place in the file, which
    an index keeps: one process reads every shard for it, once, and writes it to the workdir, or beside
    the shards; it holds as long as their names, sizes and times of change do.

    Raises:
      UserError: if there are no shards, one cannot be read, or an image has no caption.
    """

    captioned, num_classes = True, 0

    def __init__(
        self,
        path: str,
        split: str,
        workdir: epath.Path | None = None,
        watch: Callable[[str], None] = lambda what: None,
    ):
        self.root = split_root(path, split)
        shards = tars.list_shards(self.root)
        if not shards:
            raise UserError(f"{self.root} holds no .tar files")
        self._paths = [f"{self.root}/{name}" for name, *_ in shards]
        beside = epath.Path(self.root) / tars.INDEX
        places = [beside] if workdir is None else [workdir / tars.INDEX, beside]
        self._keys, self._places = tars.load_index(self.root, shards, places, watch)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> tuple[bytes, tuple[str, ...]]:
        shard, begin, size, text_begin, text_size, is_json = self._places[index].tolist()
        first, last = min(begin, text_begin), max(begin + size, text_begin + text_size)
        if last - first > size + text_size + GAP:
            return self._read(shard, begin, size), self.captions(index)
        data = self._read(shard, first, last - first)
        text = data[text_begin - first :][:text_size]
        return data[begin - first :][:size], self._decode(index, text, is_json)

    def captions(self, index: int) -> tuple[str, ...]:
        """Those of example `index`, without its image."""
        shard, _, _, begin, size, is_json = self._places[index].tolist()
        return self._decode(index, self._read(shard, begin, size), is_json)

    def head(self, index: int, size: int) -> bytes:
        """The first bytes of an image."""
        shard, begin, whole, *_ = self._places[index].tolist()
        return self._read(shard, begin, min(size, whole))

    def _read(self, shard: int, begin: int, size: int) -> bytes:
        with files.reading():
            return files.read_bytes(self._paths[shard], begin, begin + size)

    def _decode(self, index: int, text: bytes, is_json: bool) -> tuple[str, ...]:
        name = self.name(index)
        if not is_json:
            return decode_captions(text, name)
        try:
            return some(captions_of(json.loads(files.decode_text(text)), name))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise OSError(f"{name}: {error}") from None

    def name(self, index: int) -> str:
        return f"{self.root}/{self._keys[index]}"

    def digest(self) -> str:
        """Of the names of shards and keys."""
        return self._keys.digest()
