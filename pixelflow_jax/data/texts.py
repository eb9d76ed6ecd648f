"""Read captions as people write them: lines of a .txt, JSON, metadata.jsonl and metadata.csv."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from pixelflow_jax.common import UserError, blame, files

METADATA = ("metadata.jsonl", "metadata.csv")
KEYS = ("text", "caption", "captions", "prompt")  # in a line of metadata, or a .json in a tar


def captions_of(values: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return the captions under one of KEYS in a JSON object. Raises UserError if there are none."""
    for key in KEYS:
        if key in values:
            found = values[key] if isinstance(values[key], list) else [values[key]]
            if not found or not all(isinstance(text, str) for text in found):
                raise UserError(f"{where}: {key!r} must be a text or a list of texts")
            for text in found:
                files.clean_text(f"{where}: {key!r}", text, is_path=False)
            return tuple(found)
    raise UserError(f"{where} has no caption; it needs one of the keys {', '.join(KEYS)}")


def some(captions: Iterable[str]) -> tuple[str, ...]:
    """Return an example's captions. Raises OSError, as for a broken image, if all are blank."""
    found = tuple(captions)
    if not any(text.strip() for text in found):
        raise OSError("its caption is empty")
    return found


def decode_captions(data: bytes, where: str) -> tuple[str, ...]:
    """Return the captions in a .txt, one per line. Raises OSError, as for a broken image."""
    try:
        lines = files.split_lines(files.decode_text(data))
    except UnicodeDecodeError as error:
        raise OSError(f"the caption {where} is not UTF-8, nor UTF-16 with its mark: {error}") from None
    found = tuple(filter(None, (line.strip() for line in lines)))
    if not found:
        raise OSError(f"the caption {where} is empty")
    return found


def read_metadata(path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (file name as written, captions) per line of a metadata.jsonl or .csv."""
    data = files.read_bytes(path)
    try:
        text = files.decode_text(data)
    except UnicodeDecodeError as error:
        where = f"{path}, line {1 + data[: error.start].count(10)}"
        raise UserError(f"{where} is not UTF-8, nor UTF-16 with its mark: {error}") from None
    for where, values in (_json_lines if path.endswith("jsonl") else _csv_lines)(text, path):
        yield values["file_name"], captions_of(values, where)


def _json_lines(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(files.split_lines(text), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            files.clean_text("file_name", values["file_name"], is_path=False)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{where} is not a JSON object with a file_name: {error}") from None
        yield where, values


def _csv_lines(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the lines with the separator that gives a column file_name."""
    head = files.split_lines(text)[:1]
    for separator in ",;\t":
        columns = [name.strip() for name in next(csv.reader(head, delimiter=separator), ())]
        if "file_name" in columns:
            break
    else:
        raise UserError(f"{path} has no column file_name in its first line: {''.join(head)[:200]!r}")
    rows = csv.DictReader(io.StringIO(text, newline=""), columns, delimiter=separator)
    with blame(f"{path} cannot be read", csv.Error):
        next(rows)
        for row in rows:
            values = {name: text for name, text in row.items() if isinstance(text, str)}
            where = f"{path}, line {rows.line_num}"
            if not values.get("file_name"):
                raise UserError(f"{where} has no file_name")
            yield where, values
