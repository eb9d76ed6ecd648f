"""Official weights wherever a checkpoint is named: found, downloaded from the hub, converted once.

Conversions are kept in $XDG_CACHE_HOME/pixelflow_jax (by default ~/.cache/pixelflow_jax), and found
again by the names, sizes and times of the files that they were made from.
"""

import contextlib
import hashlib
import importlib.resources
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from pixelflow_jax.common import files, optional
from pixelflow_jax.common.cache import cache_folder
from pixelflow_jax.foreign.official import CONFIG, Params, official_files, read_official
from pixelflow_jax.foreign.weights import INDEX, KINDS, TORCH, load_torch

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FORM = 1  # of conversions; a new one makes all of them anew
LEFT = 86400  # seconds after which what a killed conversion left is removed
Save = Callable[[epath.Path, Params, ConfigDict, dict[str, str]], None]


def is_hub_id(name: str) -> bool:
    """Return whether a name is a hub's rather than a folder's that is missing, as in runs/digits."""
    return bool(HUB_ID.fullmatch(name)) and not os.path.exists(os.path.dirname(name))


def find_official(name: str) -> epath.Path | None:
    """Return the folder or file of official weights with this name; None if it names something else.

    A folder that exists wins over a hub id. Only the files that a conversion needs are downloaded, and
    PyTorch's only if nothing else is there. Raises UserError if the hub does not have it, or the extra
    `convert` is needed and missing.
    """
    path = epath.Path(name)
    if path.is_file():
        return path if name.endswith((*KINDS, INDEX)) else None
    if path.is_dir():
        return path if CONFIG in files.list_files(path) else None
    return _download(name) if is_hub_id(name) else None


def _download(name: str) -> epath.Path:
    kinds: Sequence[str] = KINDS
    with contextlib.suppress(Exception):  # without a network, an earlier download may do
        hub = optional("huggingface_hub", "text", "a hub id")
        there = [x.rfilename for x in hub.HfApi().model_info(name).siblings if "/" not in x.rfilename]
        kinds = [kind for kind in KINDS if any(x.endswith(kind) for x in there)]
    kinds = [kind for kind in kinds if kind not in TORCH] or kinds
    if kinds and {*kinds} <= {*TORCH}:
        load_torch()  # say that it is missing before gigabytes are fetched
    wanted = (CONFIG, f"*{INDEX}", *(f"*{kind}" for kind in kinds))
    return files.folder_or_hub(name, "the checkpoint", wanted)


def converted(source: epath.Path, save: Save) -> epath.Path:
    """Return the folder of the conversion of official weights, made if there is none yet.

    It appears whole or not at all, also if several processes convert at once. `save` writes parameters,
    config and class names to a folder. Raises UserError as `read_official`.
    """
    weights, config = official_files(source)
    used = [weights, config]
    if weights.name.endswith(INDEX):
        used += [weights.parent / x for x in files.list_files(weights.parent) if x.endswith(KINDS)]
    known = [(str(files.absolute(x)), *_version(x)) for x in used]
    digest = hashlib.sha256(json.dumps([FORM, known]).encode()).hexdigest()[:20]
    root = cache_folder() / "converted"
    place, how = epath.Path(root / digest), "before"
    if not place.exists():
        how = "now, once"
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob("part-*"):
            if time.time() - left.stat().st_mtime > LEFT:
                shutil.rmtree(left, ignore_errors=True)
        params, read = read_official(source)
        with tempfile.TemporaryDirectory(prefix="part-", dir=root) as part:
            save(epath.Path(part) / "made", params, read, class_names(read))
            try:
                os.rename(os.path.join(part, "made"), place)
            except OSError:
                if not place.exists():  # otherwise another process was faster
                    raise
    if not jax.process_index():
        print(f"{source} holds official weights, converted {how}: {place}", file=sys.stderr)
    return place


def _version(path: epath.Path) -> tuple[int, int]:
    """Return a file's size and time of change."""
    if files.is_remote(path):
        found = path.stat()
        return found.length, found.mtime
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def class_names(config: ConfigDict) -> dict[str, str]:
    """Return {number: name} of ImageNet's classes if these are what the model knows, else nothing."""
    if config.model.num_classes != 1000:
        return {}
    text = importlib.resources.files("pixelflow_jax.foreign").joinpath("imagenet.txt").read_text("utf-8")
    return {str(number): name for number, name in enumerate(text.splitlines())}
