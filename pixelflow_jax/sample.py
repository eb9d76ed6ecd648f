"""Generates images from a checkpoint.

    python -m pixelflow_jax.sample --checkpoint=runs/digits --out=samples
    python -m pixelflow_jax.sample --checkpoint=runs/digits --labels=3,7 --num_images=20 --out=sevens
    python -m pixelflow_jax.sample --checkpoint=runs/t2i_tiny --prompt="a small red six" --out=six
    python -m pixelflow_jax.sample --checkpoint=xl --num_images=50000 --solver=dopri5 --out=fifty

Writes samples.npz (arr_0: uint8 [N, H, W, 3], as ADM's evaluator reads; labels; nfe: evaluations of each
image in each stage), 000000.png ..., grid.png and settings.json. Image i depends on the seed, its number
and its label, not on the batch, the devices or the hosts. All devices and hosts take part. A folder that
holds files is refused, except one whose settings.json equals the request: that one is completed.

Each PNG file carries its settings; `--from_png=FILE` makes it again.

Other starts than noise from --seed:

    --init_image=cat.png --from_stage=2 --strength=0.7     variations of an image
    --init_image=small.png --from_stage=2                  upscaling, if its size is that of stage 1
    --invert=cat.png --labels=3                            the noise of an image, and back with
    --from_noise=OUT/noise.npz                             the noise.npz that this wrote
    --interpolate=3,4                                      from one seed's noise to another's
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int
from tqdm import tqdm

from pixelflow_jax.common import arrays, cli, files, locks
from pixelflow_jax.common.errors import UserError
from pixelflow_jax.config import default_config
from pixelflow_jax.distributed import hosts
from pixelflow_jax.distributed.watchdog import STARTING, WAITING, joined
from pixelflow_jax.models.conditioning import encode_text
from pixelflow_jax.requests import request
from pixelflow_jax.requests.conditions import read_conditions, read_prompts
from pixelflow_jax.requests.layouts import write_layout
from pixelflow_jax.requests.output import OutputFolder, chunks
from pixelflow_jax.sampling import starts
from pixelflow_jax.sampling.generate import AXIS, fit_image, image_mesh, make_generate, save_strip
from pixelflow_jax.training.checkpoints import load_params


class NotFinite(Exception):
    """An image with a number that is none; the message says which, and what to try."""


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = request.parse(__doc__, sys.argv[1:] if argv is None else argv)
    request.check_flags(args)
    with joined(
        default_config().hosts, patient=True, flags=vars(args) | {"given": sorted(args.given)}
    ) as watch:
        try:
            report = invert(args) if args.invert else run(args, watch)[0]
        except NotFinite as error:
            sys.exit(f"error: {error}")
    if jax.process_index() == 0:
        print(report)


def run(args: argparse.Namespace, watch: Callable[[str], None]) -> tuple[str, float | None]:
    """Samples what the flags ask for.

    Returns the line to report, and this process's seconds an image: the median over its batches but the
    first, which compiles; None if there was no other. Raises NotFinite.
    """
    job = request.prepare(args)
    folder = OutputFolder(
        args.out, (job.sampler.height, job.sampler.width, 3), job.conditions.extra, args.num_png
    )
    folder.check(job.settings)
    hosts.barrier("every process has looked at the output folder")
    with locks.held(args.out, "--out") if jax.process_index() == 0 else contextlib.nullcontext():
        return _fill(args, job, folder, watch)


def _fill(
    args: argparse.Namespace, job: request.Job, folder: OutputFolder, watch: Callable[[str], None]
) -> tuple[str, float | None]:
    """`run` in an output folder that is its own."""
    if jax.process_index() == 0:
        folder.claim(job.settings, lambda what: watch(f"{STARTING}: {what}"))
    made, seconds = 0, []
    if not folder.is_complete():
        hosts.barrier("the output folder is there")
        made, seconds = _make(args, job, folder, watch)
        watch(WAITING)
        hosts.barrier("all images are made")
    if jax.process_index() == 0:
        folder.finish(job.settings_of, watch)
        if args.layout is not None:
            where = folder.path / "samples.npz", read_prompts(args), folder.path / args.layout
            write_layout(args.layout, *where, watch)
    watch(WAITING)
    hosts.barrier("samples.npz is there")
    if jax.process_index() != 0:
        return "", None
    total = evaluations(folder.path).sum(axis=1)
    spread = f" ({total.min()} to {total.max()})" if total.min() != total.max() else ""
    report = (
        f"Wrote {made} images{' here' if jax.process_count() > 1 else ''} ({folder.count} in all), "
        f"step {job.settings['step']}, guidance {job.settings['guidance_scale']}, "
        f"{job.settings['solver']}, {total.mean():.4g} evaluations an image{spread}: "
        f"{folder.path / 'grid.png'}"
    )
    return report, float(np.median(seconds)) if seconds else None


def evaluations(folder: epath.PathLike) -> Int[np.ndarray, "n stages"]:
    """The evaluations of each image in each stage, of a finished output folder."""
    return arrays.read_npz(epath.Path(folder) / "samples.npz", "nfe")


def _make(
    args: argparse.Namespace, job: request.Job, folder: OutputFolder, watch: Callable[[str], None]
) -> tuple[int, list[float]]:
    """Makes this process's share of the images that are missing.

    Returns how many, and the seconds an image of each batch but the first.
    """
    mesh = image_mesh(jax.local_devices(), args.context)
    groups = mesh.shape[AXIS]
    size = -(-job.batch_size // groups) * groups  # as many on every device
    params = jax.device_put(job.params, NamedSharding(mesh, P()))
    generate = make_generate(job.sampler, job.start, mesh)
    mine = chunks(folder.count, size, jax.process_index(), jax.process_count())
    missing = folder.missing()
    parts = [part for chunk in mine if len(part := chunk[np.isin(chunk, missing)])]
    made, seconds = 0, []
    quiet = jax.process_index() != 0
    with tqdm(total=sum(map(len, parts)), unit="image", dynamic_ncols=True, disable=quiet) as bar:
        for chosen in parts:
            watch(f"{'' if made else f'{STARTING}: '}image {chosen[0]}")  # the first compiles
            begin = time.perf_counter()
            padded = np.resize(chosen, size)  # one shape, so one compilation
            out = generate(params, job.start.inputs(padded), *job.conditions.of(padded))
            out = jax.tree.map(np.asarray, out)
            seconds.append((time.perf_counter() - begin) / size)
            if not out.finite.all():
                raise NotFinite(
                    f"image {padded[np.argmin(out.finite)]} is not finite; what was finished "
                    f"before is kept in {folder.path}. Try --dtype=float32, another --solver or more "
                    f"--num_steps; if nothing helps, the weights of --checkpoint={args.checkpoint} are "
                    f"broken"
                )
            if args.save_stages:
                for i, number in enumerate(chosen):
                    strip = [*(stage[i] for stage in out.stages), out.pixels[i]]
                    save_strip(folder.path / "stages" / f"{number:06d}.png", strip)
            folder.write(chosen, {"arr_0": out.pixels[: len(chosen)], "nfe": out.nfe[: len(chosen)]})
            made += len(chosen)
            bar.update(len(chosen))
    return made, seconds[1:]


def invert(args: argparse.Namespace) -> str:
    """Writes the noise from which the sampler makes the images of --invert; returns the report."""
    if files.list_files(args.out):
        raise UserError(f"--out={args.out} holds files already; name a new folder")
    if jax.process_count() > 1:
        raise UserError("--invert runs in one process")
    found, _ = starts.read_pictures(args.invert, "invert")
    args.num_images = len(found)
    params, config, meta = load_params(args.checkpoint, args.ema)
    sampler = request.sampler_of(args, config)
    if config.model.num_classes and not args.labels:
        raise UserError("--invert needs the class of each image: --labels=3, or --labels=3,7 in turn")
    conditions = read_conditions(args, config, None, meta)
    clean = np.stack([fit_image(x, sampler.height, sampler.width) for x in found])

    @jax.jit
    def inverted(params, clean, *conditions):
        conditions = [encode_text(sampler.model, params, c) for c in conditions]
        return starts.invert(sampler, params, clean, *conditions)

    parts, size = [], min(args.batch_size or request.BATCH, len(found))
    for begin in range(0, len(found), size):
        chosen = np.resize(np.arange(begin, min(begin + size, len(found))), size)
        noise = inverted(params, clean[chosen], *conditions.of(chosen))
        kept = min(size, len(found) - begin)
        parts.append([np.asarray(x)[:kept] for x in (noise.start, *noise.blocks)])
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    if not all(np.isfinite(part).all() for part in joined):
        raise UserError("the inversion is not finite; try --dtype=float32, or smaller --rtol and --atol")
    names = ["start", *(f"block_{stage}" for stage in range(1, len(joined)))]
    out = epath.Path(args.out)
    written = dict(zip(names, joined, strict=True)) | conditions.extra
    arrays.write_npz(out / "noise.npz", {name: (x.shape, x.dtype, [x]) for name, x in written.items()})
    return (
        f"Inverted {len(found)} images, step {meta['step']}, {sampler.solver}: {out / 'noise.npz'}. "
        f"Back: --from_noise={out / 'noise.npz'} with the same solver and guidance"
    )


if __name__ == "__main__":
    cli.run(main)
