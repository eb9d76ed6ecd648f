"""The sweep of `evaluate`: samples and judges every combination of settings, and draws what came out.

Each combination has a folder of its own, so a sweep that was stopped goes on where it was.
"""

import argparse
import io
import itertools
import os
from typing import Any

from etils import epath

from pixelflow_jax import sample
from pixelflow_jax.common import files
from pixelflow_jax.common.errors import UserError, optional, sentence
from pixelflow_jax.evaluation.judge import Reference
from pixelflow_jax.evaluation.sets import open_images
from pixelflow_jax.requests import request
from pixelflow_jax.sampling import solvers
from pixelflow_jax.training.checkpoints import load_params

AXES = ("guidance_scale", "ema", "solver", "num_steps", "num_images")
BATCH = 50  # images at a time


def cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination; a list that was not given stands for the checkpoint's own setting.

    Raises:
      UserError: for values that cannot be.
    """
    for name in args.solver or ():
        solvers.check_solver(name)
    if args.num_images is not None and not 2 <= args.num_images <= request.MOST_IMAGES:
        raise UserError(f"--num_images must lie in 2..{request.MOST_IMAGES}, got {args.num_images}")
    lists = {name: getattr(args, name) or (None,) for name in AXES[:-1]}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def run(args: argparse.Namespace, combinations: list[dict[str, Any]], reference: Reference) -> str:
    """Samples and judges all; writes sweep.json, sweep.md and sweep.png. Returns the report."""
    out, rows = epath.Path(args.out), []
    described = {
        "checkpoint": str(files.absolute(args.checkpoint)),
        "raw_parameters_sha256": request.params_hash(load_params(args.checkpoint, 0)[0]),
        "reference": args.reference,
        "features": reference.extract.name,
        "num_images": args.num_images or 1000,
    }
    _claim(out, described)
    plots = _can_plot()
    for i, cell in enumerate(combinations):
        name = (
            "_".join(f"{key}={value}" for key, value in cell.items() if value is not None) or "default"
        )
        print(f"{i + 1} of {len(combinations)}: {name}", flush=True)
        try:
            rows.append(_cell(args, cell, out / "cells" / name, reference))
        except sample.NotFinite as error:  # of this combination alone
            print(f"left out: {error}", flush=True)
        files.write_json(out / "sweep.json", rows)
    if not rows:
        raise UserError("no combination gave images that are finite; see above")
    measure = "fid" if "fid" in rows[0] else "pca_frechet"
    files.write_bytes(out / "sweep.md", _table(rows).encode())
    drawn = plots and _plot(rows, measure, out / "sweep.png")
    best = min(rows, key=lambda row: row[measure])
    where = out / ("sweep.png" if drawn else "sweep.md")
    return f"{len(rows)} combinations, best {measure} {best[measure]:.4g} with {best['name']}: {where}"


def _claim(out: epath.Path, described: dict[str, Any]) -> None:
    """Takes the folder. Raises UserError if it holds something else."""
    path = out / "settings.json"
    if files.list_files(out):
        if not path.exists():
            raise UserError(f"--out={out} holds other files; name a new or empty folder")
        if files.read_json(path) != described:
            raise UserError(
                f"--out={out} holds a sweep of another checkpoint, reference or number of images; name "
                f"a new folder"
            )
    files.write_json(path, described)


def _cell(
    args: argparse.Namespace, cell: dict[str, Any], folder: epath.Path, reference: Reference
) -> dict[str, Any]:
    """The row of one combination: read if it is done, else sampled and judged."""
    if (folder / "row.json").exists():
        return files.read_json(folder / "row.json")
    count = args.num_images or 1000
    flags = [
        f"--checkpoint={args.checkpoint}",
        f"--out={folder / 'samples'}",
        f"--num_images={count}",
        f"--batch_size={min(BATCH, max(1, count // 2))}",  # two batches: the second is timed
        "--num_png=0",
        *(f"--{name}={value}" for name, value in cell.items() if value is not None),
    ]
    sampling = request.parse("", flags)
    request.check_flags(sampling)
    report, seconds = sample.run(sampling, lambda what: None)
    print(report, flush=True)
    settings = files.read_json(folder / "samples" / "settings.json")
    nfe = sample.evaluations(folder / "samples")
    row = {
        "name": folder.name,
        **{name: settings[name] for name in ("solver", "num_steps", "guidance_scale", "ema")},
        "nfe": float(nfe.sum(axis=1).mean()),
        "seconds_per_image": seconds,
        **reference.judge(open_images(str(folder / "samples"), "samples")),
    }
    files.write_json(folder / "row.json", row)
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, the numbers of each combination in a row."""
    names = ["solver", "num_steps", "guidance_scale", "ema", "nfe", "seconds_per_image"]
    names += [name for name in rows[0] if isinstance(rows[0][name], float) and name not in names]

    def text(value):
        if isinstance(value, float):
            return f"{value:.4g}"
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(text(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _figure():
    """An empty figure that is drawn to a file. Raises UserError if matplotlib is not there, or ill."""
    shown = os.environ.pop("MPLBACKEND", None)  # a notebook's, which this Python may not have
    try:
        optional("matplotlib", "plot", "sweep.png")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if shown is not None:
            os.environ["MPLBACKEND"] = shown
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _can_plot() -> bool:
    """Whether sweep.png will be drawn; says why not, before the work."""
    try:
        _figure().savefig(io.BytesIO(), format="png")
    except Exception as error:  # fonts, a matplotlibrc, libraries that do not fit
        print(f"there will be no sweep.png: {sentence(error)}", flush=True)
        return False
    return True


def _plot(rows: list[dict[str, Any]], measure: str, path: epath.Path) -> bool:
    """Draws what `_draw` does; a picture that fails costs nothing else."""
    try:
        _draw(rows, measure, path)
    except Exception as error:
        print(f"no sweep.png: {sentence(error)}", flush=True)
        return False
    return True


def _draw(rows: list[dict[str, Any]], measure: str, path: epath.Path) -> None:
    """Quality against evaluations and against seconds, a line a solver, guidance and EMA."""
    figure = _figure()
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("nfe", "seconds_per_image"),
        ("network evaluations an image", "seconds an image"),
        strict=True,
    ):
        lines: dict[str, list] = {}
        for row in rows:
            if row[key] is not None:
                name = f"{row['solver']}, guidance {row['guidance_scale']:g}, EMA {row['ema']:g}"
                lines.setdefault(name, []).append((row[key], row[measure]))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        axes.set(xlabel=label, ylabel=measure, xscale="log")
    axes.legend(fontsize="small")
    with files.create(path) as file:
        figure.savefig(file, format="png", dpi=120)
