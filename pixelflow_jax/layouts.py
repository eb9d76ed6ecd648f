"""Samples in the folders that the scorers of GenEval and DPG-Bench read.

GenEval (djghosh13/geneval, evaluate_images.py): 00000/metadata.jsonl, the prompt's line of
evaluation_metadata.jsonl, and 00000/samples/0000.png ... . DPG-Bench (TencentQQGYLab/ELLA,
compute_dpg_bench.py): NAME.png for the prompt file NAME.txt, four samples as one 2x2 picture.
"""

import json

import numpy as np
from etils import epath
from jaxtyping import UInt8

from pixelflow_jax import arrays, files
from pixelflow_jax.errors import UserError
from pixelflow_jax.sampling.generate import save_png

LAYOUTS = ("geneval", "dpg")
DPG_IMAGES = 4


def read_prompts_file(name: str) -> list[dict]:
    """[{"prompt": ..., and what else is known}] of a text file, a .jsonl, or a folder of .txt files.

    Blank lines at the end do not count.

    Raises:
      UserError: if it is not there, cannot be decoded, or holds an empty prompt.
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
        raise UserError(f"{flag} is not UTF-8, nor UTF-16 with its mark: {error}") from None
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
    """Raises UserError if the images of a request do not fill a layout."""
    each, rest = divmod(count, len(entries))
    if rest or (layout == "dpg" and each != DPG_IMAGES):
        wanted = f"{DPG_IMAGES} images" if layout == "dpg" else "as many images for each"
        raise UserError(
            f"--layout={layout} needs {wanted} a prompt; for {len(entries)} prompts set "
            f"--num_images={DPG_IMAGES * len(entries)}"
        )
    if layout == "dpg" and not all("name" in entry for entry in entries):
        raise UserError("--layout=dpg needs --prompts_file=FOLDER with a .txt for each prompt")


def write_layout(layout: str, samples: epath.Path, entries: list[dict], out: epath.Path) -> None:
    """Writes samples.npz, as files of a layout; its `prompt` says which one each image shows."""
    pixels, prompts = (arrays.read_npz(samples, name) for name in ("arr_0", "prompt"))
    for number, entry in enumerate(entries):
        mine = pixels[prompts == number]
        if layout == "dpg":
            out.mkdir(parents=True, exist_ok=True)
            save_png(out / f"{entry['name']}.png", _two_by_two(mine))
            continue
        folder = out / f"{number:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        files.write_bytes(folder / "metadata.jsonl", json.dumps(entry.get("line", entry)).encode())
        for place, image in enumerate(mine):
            save_png(folder / "samples" / f"{place:04d}.png", image)


def _two_by_two(four: UInt8[np.ndarray, "4 h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    return np.concatenate([np.concatenate(list(pair), axis=1) for pair in (four[:2], four[2:])], axis=0)
