"""Samples in the folder layouts that the scorers of GenEval and DPG-Bench read.

GenEval (djghosh13/geneval, evaluate_images.py): 00000/metadata.jsonl, the prompt's line of
evaluation_metadata.jsonl, and 00000/samples/0000.png ... . DPG-Bench (TencentQQGYLab/ELLA,
compute_dpg_bench.py): NAME.png for the prompt file NAME.txt, with four samples as one 2x2 grid.
"""

import json
from collections.abc import Callable

import numpy as np
from etils import epath

from pixelflow_jax.common import UserError, arrays, files
from pixelflow_jax.sampling.generate import save_png

LAYOUTS = ("geneval", "dpg")
DPG_IMAGES = 4


def read_prompts_file(name: str) -> list[dict]:
    """Return [{"prompt": ..., other keys}] from a text file, a .jsonl, or a folder of .txt files.

    Blank lines at the end are ignored. Raises UserError if there is no such file, it cannot be decoded,
    or a prompt is empty.
    """
    path, flag = epath.Path(name), f"--prompts_file={name}"
    try:
        if path.is_dir():
            found = [p for p in files.list_files(path) if p.lower().endswith(".txt")]
            texts = [files.decode_text(files.read_bytes(path / p)) for p in found]
            entries = [dict(prompt=x, name=p[: -len(".txt")]) for x, p in zip(texts, found, strict=True)]
        else:
            lines = files.read_lines(path)
            while lines and not lines[-1].strip():
                lines.pop()
            as_json = path.suffix.lower() in (".jsonl", ".ndjson")
            entries = [_json(line, f"{flag}: line {n}") if as_json else {"prompt": line}
                       for n, line in enumerate(lines, 1)]  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{flag} is neither a file nor a folder") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} is not UTF-8, nor UTF-16 with a byte-order mark: {error}") from None
    if not entries:
        raise UserError(f"{flag} holds no prompts")
    for number, entry in enumerate(entries, 1):
        entry["prompt"] = entry["prompt"].strip()
        if not entry["prompt"]:
            where = f"{entry['name']}.txt" if "name" in entry else f"line {number}"
            raise UserError(f"{flag}: {where} is empty")
    return entries


def _json(line: str, where: str) -> dict:
    try:
        entry = json.loads(line)
        if isinstance(entry["prompt"], str):
            return {"prompt": entry["prompt"], "line": entry}
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f'{where} is not a JSON object with a "prompt"')


def check_layout(layout: str, entries: list[dict], count: int) -> None:
    """Raise UserError unless the images of a request fill a layout."""
    each, rest = divmod(count, len(entries))
    if rest or (layout == "dpg" and each != DPG_IMAGES):
        wanted = f"{DPG_IMAGES} images" if layout == "dpg" else "as many images for each"
        raise UserError(
            f"--layout={layout} needs {wanted} per prompt; for {len(entries)} prompts set "
            f"--num_images={DPG_IMAGES * len(entries)}"
        )
    if layout == "dpg" and not all("name" in entry for entry in entries):
        raise UserError("--layout=dpg needs --prompts_file=FOLDER with a .txt for each prompt")


def write_layout(
    layout: str,
    samples: epath.Path,
    entries: list[dict],
    out: epath.Path,
    watch: Callable[[str], None] = lambda what: None,
) -> None:
    """Write the images of samples.npz as files of a layout, by the prompt index of each image.

    Holds only a few images in memory. `watch` is called with the current position.
    """
    prompts = arrays.read_npz(samples, "prompt")
    write = _write_dpg if layout == "dpg" else _write_geneval
    write(samples, prompts, entries, out, watch)


def _write_geneval(samples, prompts, entries, out, watch) -> None:
    for number, entry in enumerate(entries):
        line = json.dumps(entry.get("line", entry)).encode()
        files.write_bytes(out / f"{number:05d}" / "metadata.jsonl", line)
    seen = np.zeros(len(entries), int)
    for number, (image,) in zip(prompts.tolist(), arrays.rows(samples, "arr_0", 1), strict=True):
        watch(f"an image of prompt {number}")
        save_png(out / f"{number:05d}" / "samples" / f"{seen[number]:04d}.png", image)
        seen[number] += 1


def _write_dpg(samples, prompts, entries, out, watch) -> None:
    # Prompts are used cyclically, so the four images of a prompt are far apart: one stream for each.
    streams = [arrays.Stream(samples, "arr_0") for _ in range(DPG_IMAGES)]
    table = np.argsort(prompts, kind="stable").reshape(-1, DPG_IMAGES)
    for entry, four in zip(entries, table.tolist(), strict=True):
        watch(f"the images of {entry['name']}")
        images = [stream.read(i, i + 1)[0] for stream, i in zip(streams, four, strict=True)]
        rows = [np.concatenate(pair, axis=1) for pair in (images[:2], images[2:])]
        save_png(out / f"{entry['name']}.png", np.concatenate(rows))
