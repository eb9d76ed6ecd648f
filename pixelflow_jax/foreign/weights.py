"""Read weights that other programs saved, and find a network's arrays in them.

A training's file holds several sets of weights, at some depth and under the names of wrappers. The
arrays' own names tell which belong to the network, whatever the sets are called. No code in a file is
run.
"""

import argparse
import collections
import contextlib
import functools
import io
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pixelflow_jax.common import UserError, blame, files, hardware, listed, optional

TORCH = (".pt", ".pth", ".ckpt", ".bin")
KINDS = (*TORCH, ".safetensors", ".npz")
INDEX = ".index.json"  # suffix of a file that maps arrays to other files
# Parts that wrappers insert anywhere in names
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGES = re.compile(r"(^|[._])(ema|shadow|average)")
State = dict[str, np.ndarray]


class Leaf(NamedTuple):
    """An array of a file: the dicts around it, its name there, and how to read it."""

    level: tuple[str, ...]
    name: tuple[str, ...]  # split at the dots
    read: Callable[[], np.ndarray]


def read_state(path: epath.PathLike, known: Callable[[str], bool], weights: str = "auto") -> State:
    """Return the arrays of a file that `find` finds."""
    return {name: read() for name, read in find(path, known, weights).items()}


def find(
    path: epath.PathLike, known: Callable[[str], bool], weights: str = "auto"
) -> dict[str, Callable[[], np.ndarray]]:
    """Return {name: function that reads it} of a network's arrays in a weights file.

    Args:
      path: .pt, .pth, .ckpt or .bin (PyTorch's, weights only), .safetensors, .npz (no pickle), or an
        .index.json beside such files.
      known: whether a name is that of an array of this network.
      weights: which of several sets: its name as errors show it, a part of that name, or "auto" for the
        only set or the only average.

    Raises UserError if the file is not what its suffix says, holds no such arrays, or several sets fit.
    """
    path = epath.Path(path)
    if not path.name.endswith((INDEX, *KINDS)):
        raise UserError(f"{path}: expected a {', '.join(KINDS)} or {INDEX} file")
    leaves = list(_open(path))
    sets = _sets(leaves, known)
    if not sets:
        shown = listed([".".join((*leaf.level, *leaf.name)) for leaf in leaves], 4)
        raise UserError(f"{path} holds no array of this network; it holds {shown or 'no arrays at all'}")
    fitting = [name for name in sets if weights in ("auto", name)]
    if len(fitting) != 1:
        averages = weights == "auto" and [name for name in sets if AVERAGES.search(name)]
        fitting = averages or [name for name in sets if weights in name.split(".")]
    if len(fitting) != 1:
        asked = "" if weights == "auto" else f", of which {weights!r} names none or several"
        raise UserError(
            f"{path} holds these sets of weights: {', '.join(sets)}{asked}; choose one with `convert "
            f"--weights=NAME`"
        )
    return sets[fitting[0]]


def _sets(leaves: list[Leaf], known: Callable[[str], bool]) -> dict[str, dict[str, Callable]]:
    """Return {name: arrays} of the sets of weights: dicts or prefixes that hold known names."""
    counts: collections.Counter = collections.Counter()
    for level, name, _ in leaves:
        ends = (i for i in reversed(range(len(name))) if name[i] not in WRAPPERS)
        begin = next((i for i in ends if known(_plain(name[i:]))), None)
        if begin is not None:
            counts[level, name[:begin]] += 1
    most = max(counts.values(), default=0)
    places = [place for place, count in counts.items() if 2 * count >= most]
    sets: dict[str, dict[str, Callable]] = {".".join((*a, *b)) or ".": {} for a, b in places}
    for level, name, read in leaves:
        mine = [b for a, b in places if a == level and name[: len(b)] == b]
        if mine:
            prefix = max(mine, key=len)
            sets[".".join((*level, *prefix)) or "."][_plain(name[len(prefix) :])] = read
    return sets


def _plain(name: tuple[str, ...]) -> str:
    return ".".join(part for part in name if part not in WRAPPERS)


def _open(path: epath.Path) -> Iterator[Leaf]:
    if path.name.endswith(INDEX):
        for name in _shards(path):
            yield from _open(path.parent / name)
        return
    with blame(f"{path} cannot be read as {path.suffix}"):  # each reader raises its own errors
        if path.suffix == ".safetensors":
            found = _open_safetensors(path)
        elif path.suffix == ".npz":
            file = np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False)
            found = {name: functools.partial(file.__getitem__, name) for name in file.files}
        else:
            yield from list(_walk(_load_torch(path), path))
            return
    for name, read in found.items():
        yield Leaf((), tuple(name.split(".")), functools.partial(_read, path, name, read))


def _read(path: epath.Path, name: str, read: Callable) -> np.ndarray:
    with blame(f"{path}: {name} cannot be read"):
        return np.asarray(read())


def _shards(path: epath.Path) -> list[str]:
    """Return the files that an index names, which must be beside it."""
    index = files.read_json(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path} has no weight_map of names to files")
    names = sorted(set(places.values()))
    for name in names:
        if "/" in name or not name.endswith(KINDS) or not (path.parent / name).exists():
            raise UserError(f"{path} names {name}, which is no weights file beside it")
    return names


def _open_safetensors(path: epath.Path) -> dict[str, Callable]:
    from safetensors import safe_open

    hardware.local_devices()  # reading goes over a device
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(files.open_file(path))
        if files.is_remote(path):
            copy = stack.enter_context(tempfile.NamedTemporaryFile())
            shutil.copyfileobj(local, copy)
            copy.flush()
            local = copy
        file = safe_open(local.name, framework="flax")  # unlike numpy's, it reads bfloat16
    return {name: functools.partial(file.get_tensor, name) for name in file.keys()}


def load_torch() -> Any:
    """Return the module torch. Raises UserError if it is not installed."""
    return optional("torch", "convert", "a PyTorch file")


def _load_torch(path: epath.Path) -> Any:
    torch = load_torch()
    # The official training keeps its flags in its checkpoints, in a Namespace, which is only data.
    with files.open_file(path) as file, torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            kind = re.search(r"GLOBAL (\S+)", str(error))
            if kind is None:
                raise
            raise UserError(
                f"{path} cannot be read without running code: it holds an object of {kind[1]}. Save the "
                f"weights alone: torch.save(model.state_dict(), FILE)"
            ) from None


def _walk(tree: Any, path: epath.Path, level: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield the tensors in nested dicts and lists; floating-point ones become float32."""
    if isinstance(tree, Mapping):
        items = tree.items()
    else:
        items = enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        if hasattr(value, "detach"):
            read = functools.partial(_read, path, str(key), functools.partial(_numpy, value))
            yield Leaf(level, tuple(str(key).split(".")), read)
        else:
            yield from _walk(value, path, (*level, str(key)))


def _numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
