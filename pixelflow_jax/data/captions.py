"""Captioned images: folders (Hugging Face's ImageFolder convention) and WebDataset tar shards."""

import collections
import itertools
import json
import os

from etils import epath

from pixelflow_jax.common import UserError, files, listed
from pixelflow_jax.data import tars
from pixelflow_jax.data.base import NO_SCAN, NamedSource, Scan, split_root
from pixelflow_jax.data.names import LISTED, Finder, Strings, pair, say_beside
from pixelflow_jax.data.pixels import is_image, report_left_out
from pixelflow_jax.data.texts import METADATA, captions_of, decode_captions, read_metadata, some

GAP = 2**16  # bytes between an image and its caption in a tar up to which one request reads both


class CaptionFolder(NamedSource):
    """Images anywhere below a folder, with their captions.

    Captions come from a metadata.jsonl beside the images or above, a line per image: {"file_name":
    "a.png", "text": "..."}; from a metadata.csv with such columns; or from NAME.txt (see `pair`), with
    one caption per line. Raises UserError if an image has no caption, or the metadata is malformed.
    """

    captioned = True

    def __init__(self, path: str, split: str):
        root = split_root(path, split)
        folders = files.walk(root)
        images = [[x for name in names if is_image(x := f"{where}{name}")] for where, names in folders]
        told = _read_all_metadata(root, [(x, {*METADATA} & {*names}) for x, names in folders], images)
        texts, bare, beside, others = {}, [], set(), []
        for (where, names), here in zip(folders, images, strict=True):
            here = [name for name in here if name not in told]
            captions = [f"{where}{name}" for name in names if name.lower().endswith(".txt")]
            others += {f"{where}{name}" for name in names if name not in METADATA}.difference(captions)
            found = pair(here, captions)
            texts |= found[0]
            bare += found[1]
            beside.update(found[2])
        names = [name for name in itertools.chain.from_iterable(images) if name not in beside]
        if bare:
            raise UserError(
                f"{root}: {len(bare)} of {len(names)} images have no caption (a line in "
                f"{' or '.join(METADATA)}, or NAME.txt): {listed(bare, LISTED)}"
            )
        report_left_out(root, others)
        say_beside(root, sorted(beside))
        super().__init__(root, Strings(names))
        # Per image: its captions as a JSON list, or "=" and a file's name, or "" for NAME.txt
        beside_it = (f"{os.path.splitext(name)[0]}.txt" for name in names)
        self._captions = Strings(
            json.dumps(told[name]) if name in told else "" if texts[name] == usual else f"={texts[name]}"
            for name, usual in zip(names, beside_it, strict=True)
        )

    def __getitem__(self, index: int) -> tuple[bytes, tuple[str, ...]]:
        return files.read_bytes(self.name(index)), self.captions(index)

    def captions(self, index: int) -> tuple[str, ...]:
        known = self._captions[index]
        if known.startswith("["):
            return some(json.loads(known))
        text = f"{self.root}/{known[1:] or os.path.splitext(self._names[index])[0] + '.txt'}"
        return decode_captions(files.read_bytes(text), text)


def _read_all_metadata(
    root: str, folders: list[tuple[str, set[str]]], images: list[list[str]]
) -> dict[str, tuple[str, ...]]:
    """Return {image: captions} from the metadata files of these folders."""
    folders, found = [x for x in folders if x[1]], collections.defaultdict(tuple)
    find = Finder(itertools.chain.from_iterable(images)) if folders else None
    for folder, there in folders:
        missing = []
        if len(there) > 1:
            raise UserError(f"{root}/{folder} holds {' and '.join(METADATA)}: keep one of them")
        for asked, captions in read_metadata(f"{root}/{folder}{there.pop()}"):
            name = find(f"{folder}{asked}")
            if name is None:
                missing.append(asked)
            else:
                found[name] += captions
        if missing:
            raise UserError(
                f"{root}/{folder}: the metadata names {folder}{min(missing)}, which is not there"
                f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}"
            )
    return found


class TarSource(NamedSource):
    """WebDataset shards: the members KEY.jpg (or another image) and KEY.txt or KEY.json of *.tar files.

    KEY is the path up to the last dot (see `pair`). Examples are read from their offsets, which an index
    keeps. One process reads every shard once to make the index, and writes it to the workdir, or beside
    the shards; it is valid as long as the shards' names, sizes and modification times stay the same.
    Raises UserError if there are no shards, one cannot be read, or an image has no caption.
    """

    captioned = True

    def __init__(self, path: str, split: str, scan: Scan = NO_SCAN):
        root = split_root(path, split)
        shards = tars.list_shards(root)
        if not shards:
            raise UserError(f"{root} holds no .tar files")
        self._paths = [f"{root}/{name}" for name, *_ in shards]
        beside = epath.Path(root) / tars.INDEX
        places = [scan.workdir / tars.INDEX, beside] if scan.workdir else [beside]
        keys, self._places = tars.load_index(root, shards, places, scan.watch)
        super().__init__(root, keys)

    def __getitem__(self, index: int) -> tuple[bytes, tuple[str, ...]]:
        shard, begin, size, text_begin, text_size, is_json = self._places[index].tolist()
        first, last = min(begin, text_begin), max(begin + size, text_begin + text_size)
        if last - first > size + text_size + GAP:
            return self._read(shard, begin, size), self.captions(index)
        data = self._read(shard, first, last - first)
        text = data[text_begin - first :][:text_size]
        return data[begin - first :][:size], self._decode(index, text, is_json)

    def captions(self, index: int) -> tuple[str, ...]:
        shard, _, _, begin, size, is_json = self._places[index].tolist()
        return self._decode(index, self._read(shard, begin, size), is_json)

    def head(self, index: int, size: int) -> bytes:
        shard, begin, whole, *_ = self._places[index].tolist()
        return self._read(shard, begin, min(size, whole))

    def _read(self, shard: int, begin: int, size: int) -> bytes:
        return files.read_bytes(self._paths[shard], begin, begin + size)

    def _decode(self, index: int, text: bytes, is_json: bool) -> tuple[str, ...]:
        name = self.name(index)
        if not is_json:
            return decode_captions(text, name)
        try:
            return some(captions_of(json.loads(files.decode_text(text)), name))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise OSError(f"{name}: {error}") from None
