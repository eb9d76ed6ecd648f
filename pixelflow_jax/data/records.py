"""Write and read ArrayRecord shards of encoded images, the format of `python -m pixelflow_jax.pack`.

A record is the label (int32, little-endian), then the encoded image. Captioned images have -1 - n in
place of the label, then n bytes: their captions as a JSON list. manifest.json lists the shards and how
many records each must hold.
"""

import hashlib
import io
import json
import struct
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from pixelflow_jax.common import UserError, blame, files, log, optional
from pixelflow_jax.common.claims import Description, claim
from pixelflow_jax.data.base import Source
from pixelflow_jax.data.texts import some

MANIFEST = "manifest.json"
LABEL = struct.Struct("<i")
WRITER_OPTIONS = "group_size:1,uncompressed"  # random access; images are compressed already


def _array_record(module: str):
    return optional(f"array_record.python.{module}", "data", "an ArrayRecord file")


class RecordSource(Source):
    """Random access to a folder of shards.

    Raises UserError if the manifest or a shard is missing or incomplete, or a shard has another length.
    """

    def __init__(self, path: str, split: str):
        manifest = files.read_json(epath.Path(path) / MANIFEST)
        if (
            not isinstance(manifest, dict)
            or not {"complete", "shards", "num_classes"} <= manifest.keys()
        ):
            raise UserError(f"{path}/{MANIFEST} is not a manifest of packed images")
        packed = manifest.get("origin", {}).get("split", split)
        if packed != split:
            raise UserError(f"{path} holds the split {packed!r}, config.data.split is {split!r}")
        if not manifest["complete"]:
            raise UserError(f"{path} is not completely packed; run the same pack command again")
        self.num_classes = manifest["num_classes"]
        self.captioned = manifest.get("captioned", False)
        self.classes, self.present = manifest.get("classes", []), manifest.get("present")
        self._names = [shard["name"] for shard in manifest["shards"]]
        self._counts = [shard["records"] for shard in manifest["shards"]]
        self._path = path
        reader_module = _array_record("array_record_data_source")
        with blame(f"{path} has a shard that cannot be read"):  # riegeli has its own errors
            names = [f"{path}/{name}" for name in self._names]
            self._reader = reader_module.ArrayRecordDataSource(names)
            found = len(self._reader)
        if found != sum(self._counts):
            raise UserError(f"{path} holds {found} records, its {MANIFEST} says {sum(self._counts)}")

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with files.reading():
            record = self._reader[index]
            label, body = LABEL.unpack_from(record)[0], record[LABEL.size :]
            if not self.captioned:
                return body, label
            captions = some(json.loads(body[: -1 - label]))
            return body[-1 - label :], captions

    def digest(self) -> str:
        """Return a digest of the shards' counts and sizes; their names and place do not matter."""
        sizes = [(epath.Path(self._path) / name).stat().length for name in self._names]
        known = [self.num_classes, self.captioned, self._counts, sizes]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(np.cumsum(self._counts), index, side="right"))
        return f"{self._path}/{self._names[shard]}, record {index - sum(self._counts[:shard])}"


def pack(source, out: str, shard_size: int, origin: dict[str, Any]) -> int:
    """Write every example of `source` to shards in `out`; return how many shards were written.

    Shard k holds the examples [k, k + 1) x shard_size, so an interrupted packing continues with the
    missing shards. `origin` says what is packed, and must agree with a packing that is continued. Raises
    UserError if `out` holds something else.
    """
    writer_module, folder = _array_record("array_record_module"), epath.Path(out)
    count = len(source)
    starts = range(0, count, shard_size)
    sizes = [min(shard_size, count - start) for start in starts]
    names = [f"{k:05d}-of-{len(starts):05d}.array_record" for k in range(len(starts))]
    manifest = {
        "complete": False,
        "origin": {**origin, "names": _names_digest(source)},
        "num_classes": source.num_classes,
        "classes": list(source.classes),
        "present": source.present,
        "captioned": source.captioned,
        "shards": [dict(name=n, records=s) for n, s in zip(names, sizes, strict=True)],
    }

    def changes(kept):
        names = (kept.keys() | {"shards", "num_classes"}) - {"complete", "classes"}
        changed = sorted(name for name in names if kept.get(name) != manifest.get(name))
        return [f"{', '.join(changed)} differ"] if changed else []

    described = Description(
        manifest, "another packing, or its source has changed since", MANIFEST, changes=changes
    )
    with claim(out, described):
        present = files.list_files(folder)
        missing = [k for k, name in enumerate(names) if name not in present]
        for k in tqdm(missing, unit="shard"):
            with files.atomic_path(folder / names[k]) as temporary:
                writer = writer_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
                for index in range(starts[k], starts[k] + sizes[k]):
                    writer.write(_record(source, index))
                writer.close()
        files.write_json(folder / MANIFEST, {**manifest, "complete": True})
    return len(missing)


def _record(source: Source, index: int) -> bytes:
    """Return an example's record; a broken one has neither image nor caption, and stays broken."""
    try:
        data, label = source[index]
    except OSError as error:
        log.warning("broken example %d: %s", index, error)
        data, label = b"", () if source.captioned else 0
    if isinstance(data, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(data).save(buffer, "PNG")
        data = buffer.getvalue()
    if not source.captioned:
        return LABEL.pack(label) + data
    captions = json.dumps(label, ensure_ascii=False).encode()
    return LABEL.pack(-1 - len(captions)) + captions + data


def _names_digest(source) -> str:
    """Return a digest of all names, so that shards of two states of a folder are not mixed."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.name(index).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
