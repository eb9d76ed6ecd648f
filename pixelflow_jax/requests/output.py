"""The output folder of a sampling run: shards during the run, then samples.npz, PNG files and the grid.

Images are generated in chunks of a fixed size. Each finished chunk becomes a file in shards/, so that an
interrupted run continues without generating an image twice. When all chunks exist, they are joined into
samples.npz, with equal bytes for equal requests, and the shards are removed.
"""

import collections
import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from pixelflow_jax.common import UserError, arrays, files, log
from pixelflow_jax.sampling.generate import read_image, save_grid, save_png

SHARD = re.compile(r"(\d{8})-(\d{8})\.npz")
ALL_PNG, SOME_PNG = 1000, 100  # up to ALL_PNG images, all become PNG files; of more, SOME_PNG


class OutputFolder:
    """The folder of one request, whose images have `size` (height, width, 3).

    `extra` are additional contents of samples.npz: {name: array with a row per image}. The first
    `num_png` images also become PNG files.
    """

    def __init__(
        self, path: str, size: tuple[int, int, int], extra: dict[str, np.ndarray], num_png: int | None
    ):
        self.path, self.size, self.extra = epath.Path(path), size, extra
        self.count = len(next(iter(extra.values())))
        default_png = self.count if self.count <= ALL_PNG else SOME_PNG
        self.num_png = min(self.count, default_png if num_png is None else num_png)
        self._shards = self.path / "shards"

    def drop_torn_shards(self, watch: Callable[[str], None]) -> None:
        """Remove incomplete shards, so that their images are generated again."""
        for begin, end, path in self._found():
            watch(f"checking {path.name}")
            try:
                shapes = arrays.array_shapes(path, "arr_0")
                whole = shapes.get("arr_0") == ((end - begin, *self.size), np.uint8)
            except UserError as error:
                log.warning("%s; its images are generated again", error)
                whole = False
            if not whole:
                files.remove(path)

    def is_complete(self) -> bool:
        """Return whether samples.npz exists and is complete; a damaged file counts as missing."""
        try:
            shapes = arrays.array_shapes(self.path / "samples.npz", "arr_0")
        except UserError:
            return False
        return shapes.get("arr_0") == ((self.count, *self.size), np.uint8)

    def missing(self) -> Int[np.ndarray, " n"]:
        """Return the indices of the images that are in no shard."""
        there = np.zeros(self.count, bool)
        for begin, end, _ in self._found():
            there[begin:end] = True
        return np.flatnonzero(~there)

    def write(self, index: Int[np.ndarray, " b"], parts: dict[str, np.ndarray]) -> None:
        """Write finished images (`arr_0`, and other arrays with a row per image) as shards."""
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        for run in np.split(np.arange(len(index)), breaks):
            begin, end = int(index[run[0]]), int(index[run[-1]]) + 1
            chosen = {name: part[run] for name, part in parts.items()}
            arrays.write_npz(self._shards / f"{begin:08d}-{end:08d}.npz", chosen)

    def finish(self, settings_of: Callable[[int], dict[str, Any]], watch: Callable[[str], None]) -> None:
        """Write samples.npz, the PNG files with their settings, and the grid; remove the shards."""
        if not self.is_complete():
            self._assemble(watch)
        files.remove(self._shards)
        first, seen = [], 0
        for pixels in arrays.rows(self.path / "samples.npz", "arr_0", 64):
            watch(f"PNG file {seen}")
            for i, image in enumerate(pixels[: max(0, self.num_png - seen)], seen):
                path, there = self.path / f"{i:06d}.png", None
                with contextlib.suppress(OSError):  # missing, or damaged
                    there = read_image(path)
                if not np.array_equal(there, image):
                    save_png(path, image, settings_of(i))
            first += list(pixels[: max(0, 100 - seen)])
            seen += len(pixels)
            if seen >= max(self.num_png, 100):
                break
        save_grid(self.path / "grid.png", np.stack(first))

    def _found(self) -> list[tuple[int, int, epath.Path]]:
        """Return (begin, end, file) of every shard, also of earlier runs with other chunks."""
        names = [(SHARD.fullmatch(name), name) for name in files.list_files(self._shards)]
        found = [(int(m[1]), int(m[2]), self._shards / name) for m, name in names if m]
        return sorted(entry for entry in found if entry[0] < entry[1] <= self.count)

    def _assemble(self, watch: Callable[[str], None]) -> None:
        """Join the shards, reading each once: images are streamed to samples.npz, small arrays kept."""
        found, kept = self._found(), collections.defaultdict(list)

        def pixels() -> Iterator[np.ndarray]:
            done = 0
            for begin, end, path in found:
                if end > done:
                    watch(f"image {begin}")
                    assert begin <= done, f"images {done} to {begin} are missing"
                    for name, part in arrays.read_arrays(path).items():
                        kept[name].append(part[done - begin :])
                    yield kept["arr_0"].pop()
                    done = end

        shapes = arrays.array_shapes(found[0][2])
        parts = {
            name: ((self.count, *shape[1:]), dtype, pixels() if name == "arr_0" else kept[name])
            for name, (shape, dtype) in shapes.items()
        }
        arrays.write_npz(self.path / "samples.npz", {**parts, **self.extra})


def chunks(count: int, size: int, process: int, processes: int) -> list[Int[np.ndarray, " b"]]:
    """Return the chunks of image numbers that one process makes: every `processes`-th."""
    begins = range(process * size, count, processes * size)
    return [np.arange(begin, min(begin + size, count)) for begin in begins]
