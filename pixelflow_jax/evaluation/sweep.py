"""The sweep of `evaluate`: sample and judge every combination of settings, and draw the results.

Each combination has a folder of its own, so that a sweep that was stopped continues where it was.
"""

import argparse
import dataclasses
import io
import itertools
import os
from typing import Any

from etils import epath

from pixelflow_jax.common import UserError, files, optional, sentence
from pixelflow_jax.common.claims import Description, claim
from pixelflow_jax.common.config_keys import check
from pixelflow_jax.evaluation.judge import Reference
from pixelflow_jax.evaluation.sets import open_images
from pixelflow_jax.requests import run as requests_run
from pixelflow_jax.requests.job import NotFinite
from pixelflow_jax.requests.request import Request
from pixelflow_jax.training.checkpoints import load_params
from pixelflow_jax.training.fingerprints import params_hash

AXES = ("guidance_scale", "ema", "solver", "num_steps", "num_images")
BATCH = 50  # images at a time


def cells(args: argparse.Namespace) -> dict[str, Request]:
    """Return the request of every combination, still without its folder, by the folder's name.

    A list that was not given stands for the checkpoint's own setting. Raises UserError for values that
    cannot be.
    """
    count = 1000 if args.num_images is None else args.num_images
    check("--num_images", count, "[2, 10000000]")
    given = [getattr(args, name) for name in AXES[:-1]]
    lists = [[None] if text is None else text.split(",") for text in given]
    found = {}
    for values in itertools.product(*lists):
        request = Request(
            args.checkpoint,
            num_images=count,
            batch_size=min(BATCH, max(1, count // 2)),  # two batches: the second is timed
            num_png=0,
            **dict(zip(AXES[:-1], values, strict=True)),
        )
        asked = {name: getattr(request, name) for name in AXES[:-1]}
        asked["num_steps"] = request.num_steps and request.num_steps[0]
        named = (f"{name}={value}" for name, value in asked.items() if value is not None)
        found["_".join(named) or "default"] = request
    return found


def run(args: argparse.Namespace, requests: dict[str, Request], reference: Reference) -> str:
    """Sample and judge all; write sweep.json, sweep.md and sweep.png. Return the line to report.

    Raises UserError as `claim`, and if no combination gives finite images.
    """
    described = {
        "checkpoint": str(files.absolute(args.checkpoint)),
        "raw_parameters_sha256": params_hash(load_params(args.checkpoint, 0)[0]),
        "reference": args.reference,
        "features": reference.extract.name,
        "num_images": next(iter(requests.values())).num_images,
    }
    other = "a sweep of another checkpoint, reference or number of images"
    out, rows = epath.Path(args.out), []
    with claim(args.out, Description(described, other)):
        plots = _plot([], "")  # an empty picture shows before the work whether there will be one
        for number, (name, request) in enumerate(requests.items(), 1):
            print(f"{number} of {len(requests)}: {name}", flush=True)
            try:
                rows.append(_row(request, out / "cells" / name, reference))
            except NotFinite as error:  # of this combination alone
                print(f"left out: {error}", flush=True)
            files.write_json(out / "sweep.json", rows)
        if not rows:
            raise UserError("no combination gave images that are finite; see above")
        measure = "fid" if "fid" in rows[0] else "pca_frechet"
        files.write_bytes(out / "sweep.md", _table(rows).encode())
        best, where = min(rows, key=lambda row: row[measure]), out / "sweep.md"
        if plots and (picture := _plot(rows, measure)):
            where = out / "sweep.png"
            files.write_bytes(where, picture)
    return f"{len(rows)} combinations, best {measure} {best[measure]:.4g} with {best['name']}: {where}"


def _row(request: Request, folder: epath.Path, reference: Reference) -> dict[str, Any]:
    """Return the row of one combination: read it if it is done, else sample and judge."""
    if (folder / "row.json").exists():
        return files.read_json(folder / "row.json")
    samples = folder / "samples"
    report, seconds = requests_run.sample(dataclasses.replace(request, out=samples), lambda what: None)
    print(report, flush=True)
    settings = files.read_json(samples / "settings.json")
    row = {
        "name": folder.name,
        **{name: settings[name] for name in ("solver", "num_steps", "guidance_scale", "ema")},
        "nfe": float(requests_run.evaluations(samples).sum(axis=1).mean()),
        "seconds_per_image": seconds,
        **reference.judge(open_images(str(samples), "samples")),
    }
    files.write_json(folder / "row.json", row)
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with the numbers of each combination in a row."""
    names = ["solver", "num_steps", "guidance_scale", "ema", "nfe", "seconds_per_image"]
    names += [name for name in rows[0] if isinstance(rows[0][name], float) and name not in names]

    def text(value):
        if isinstance(value, float):
            return f"{value:.4g}"
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(text(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _plot(rows: list[dict[str, Any]], measure: str) -> bytes:
    """Return a PNG file as `_draw` does; if that fails, print why and return b"": the sweep goes on."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, which this Python may not have
    try:
        optional("matplotlib", "plot", "sweep.png")
        return _draw(rows, measure)
    except Exception as error:  # also fonts, a matplotlibrc, libraries that do not fit
        print(f"no sweep.png: {sentence(error)}", flush=True)
        return b""
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _draw(rows: list[dict[str, Any]], measure: str) -> bytes:
    """Draw quality by evaluations and by seconds, with a line per solver, guidance and EMA."""
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(10, 4), layout="constrained"), io.BytesIO()
    left, right = figure.subplots(1, 2)
    left.set(xlabel="network evaluations per image", ylabel=measure, xscale="log")
    right.set(xlabel="seconds per image", ylabel=measure, xscale="log")
    for axes, key in ((left, "nfe"), (right, "seconds_per_image")):
        lines: dict[str, list] = {}
        for row in rows:
            if row[key] is not None:
                name = f"{row['solver']}, guidance {row['guidance_scale']:g}, EMA {row['ema']:g}"
                lines.setdefault(name, []).append((row[key], row[measure]))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    if rows:
        right.legend(fontsize="small")
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
