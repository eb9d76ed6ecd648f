"""An index of the members of WebDataset tar shards."""

import concurrent.futures
import contextlib
import io
import json
import tarfile
from collections.abc import Callable

import fsspec
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from pixelflow_jax.common import UserError, files, listed, log
from pixelflow_jax.data.names import LISTED, Strings, pair, say_beside
from pixelflow_jax.data.pixels import is_image, is_left_behind, report_left_out
from pixelflow_jax.distributed import hosts

INDEX = "tar_index.npz"  # in the workdir, or beside the shards
THREADS = 8  # that read shards; for a bucket, each holds files.BLOCK bytes

Index = tuple[Strings, np.ndarray]  # "SHARD:KEY", and [number of the shard, columns of _contents]


def list_shards(root: str) -> list[tuple[str, int, str]]:
    """Return (name, size, modification time) of the *.tar files in a folder, from one listing."""
    system, place = fsspec.core.url_to_fs(root)
    with files.reading():
        found = system.ls(place, detail=True)
    return sorted(
        (x["name"].rpartition("/")[2], x["size"], str(x.get("mtime") or x.get("created")))
        for x in found
        if x["name"].endswith(".tar") and x["type"] == "file"
    )


def load_index(root: str, shards: list, places: list[epath.Path], watch: Callable[[str], None]) -> Index:
    """Return the index of the shards from the first place that has it; make it otherwise.

    Process 0 makes it for all, and writes it to the first place. Where that cannot be written, or others
    do not see it, each process makes its own. Raises UserError if a shard cannot be read, or an image
    has no caption.
    """
    found, problem = _read(shards, places), None
    if not jax.distributed.is_initialized():
        return found or _scan(root, shards, watch, places[0])
    if np.all(multihost_utils.process_allgather(np.array(found is not None))):
        return found
    try:
        if jax.process_index() == 0:
            found = found or _scan(root, shards, watch, places[0])
    except Exception as error:  # the others must not wait forever
        problem = error
    hosts.barrier("the shards are read")
    if not np.all(multihost_utils.process_allgather(np.array(problem is None))):
        raise problem or UserError(f"process 0 cannot read the shards in {root}: see its log")
    return found or _read(shards, places[:1]) or _scan(root, shards, watch, places[0])


def _read(shards: list, places: list[epath.Path]) -> Index | None:
    for path in places:
        with contextlib.suppress(Exception):  # missing or damaged: it is made again
            with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as kept:
                if kept["shards"].tobytes() == _described(shards):
                    return Strings.of(kept["keys"], kept["ends"]), kept["places"]
    return None


def _described(shards: list) -> bytes:
    return json.dumps(["keys to the last dot", *shards]).encode()


def _scan(root: str, shards: list, watch: Callable[[str], None], path: epath.Path) -> Index:
    """Make the index, and write it to `path` if that is possible."""
    keys, places, others = [], [], []
    paths = [f"{root}/{name}" for name, *_ in shards]
    bar = tqdm(desc="contents of shards", total=len(paths), unit="shard", leave=False)
    with bar, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for shard, (found, where, rest) in enumerate(pool.map(_contents, paths)):
            watch(f"contents of shard {shard}")
            bar.update()
            keys += [f"{shards[shard][0]}:{key}" for key in found]
            places.append(np.insert(where, 0, shard, axis=1))
            others += rest
    report_left_out(root, others)
    keys, places = Strings(keys), np.concatenate(places)
    described = np.frombuffer(_described(shards), np.uint8)
    with contextlib.suppress(OSError), files.create(path) as file:  # the folder may be read-only
        np.savez(file, shards=described, keys=keys.data, ends=keys.ends, places=places)
    return keys, places


def _contents(path: str) -> tuple[list[str], np.ndarray, list[str]]:
    """Return a shard's keys, [offset, size of image, of caption, is JSON], and its other members."""
    images, texts, beside, rest = {}, {}, [], []
    try:
        with files.reading(), files.open_file(path) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isfile() or is_left_behind(member.name):
                        continue
                    key, _, extension = member.name.rpartition(".")
                    kind, place = extension.lower(), (member.name, member.offset_data, member.size)
                    if is_image(member.name):
                        beside += [images[key][0]] if key in images else []
                        images[key] = place
                    elif kind == "txt" or (kind == "json" and key not in texts):
                        texts[key] = place
                    elif kind != "json":
                        rest.append(member.name)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is not a tar file that can be read: {error}") from None
    by_name = {text[0]: text for text in texts.values()}
    keys = {image[0]: key for key, image in images.items()}
    found, bare, others = pair(keys, by_name)
    if bare:
        raise UserError(
            f"{path}: {len(bare)} of {len(images)} images have no caption (.txt or .json): "
            f"{listed(bare, LISTED)}"
        )
    say_beside(path, beside + others)
    if alone := sorted(by_name.keys() - found.values()):
        log.warning(
            "%s: %d captions have no image that is read: %s",
            *(path, len(alone), listed(alone, LISTED)),
        )
    chosen = [name for name in keys if name in found]
    rows = [(*images[keys[name]][1:], *by_name[found[name]][1:]) for name in chosen]
    is_json = [[found[name].lower().endswith(".json")] for name in chosen]
    places = np.hstack([np.array(rows, np.int64).reshape(-1, 4), np.array(is_json).reshape(-1, 1)])
    return [keys[name] for name in chosen], places, rest
