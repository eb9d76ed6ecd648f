"""Run a request: write its images to an output folder, or the noise of images to invert."""

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

from pixelflow_jax.common import UserError, arrays, files
from pixelflow_jax.common.claims import Description, claim
from pixelflow_jax.distributed import hosts
from pixelflow_jax.distributed.watchdog import STARTING, WAITING
from pixelflow_jax.models.conditioning import encode_text
from pixelflow_jax.requests import job as jobs
from pixelflow_jax.requests.conditions import read_conditions, read_prompts
from pixelflow_jax.requests.layouts import write_layout
from pixelflow_jax.requests.output import OutputFolder, chunks
from pixelflow_jax.requests.request import BATCH, Request
from pixelflow_jax.sampling import starts
from pixelflow_jax.sampling.generate import AXIS, fit_image, image_mesh, make_generate, save_strip
from pixelflow_jax.training.checkpoints import load_params


def sample(request: Request, watch: Callable[[str], None]) -> tuple[str, float | None]:
    """Write the images of a request to its output folder, and claim the folder for it.

    `watch` is called with the current position.

    Returns:
      The line to report, and the seconds per image on this process: the median over all batches except
      the first, which compiles; None if there was only one batch.

    Raises:
      NotFinite: if an image is not finite; those before it are kept.
      UserError: if the request does not fit the checkpoint, or as `claim`.
    """
    job = jobs.prepare(request)
    size = (job.sampler.height, job.sampler.width, 3)
    folder = OutputFolder(request.out, size, job.conditions.extra, request.num_png)
    first, made, seconds = jax.process_index() == 0, 0, []
    with claim(request.out, Description(job.settings, "samples of another request"), hosts.barrier):
        if first:
            folder.drop_torn_shards(lambda what: watch(f"{STARTING}: {what}"))
        if not folder.is_complete():
            hosts.barrier("the output folder is there")
            made, seconds = _make(request, job, folder, watch)
            watch(WAITING)
            hosts.barrier("all images are made")
        if first:
            folder.finish(job.settings_of, watch)
            if request.layout is not None:
                where = folder.path / "samples.npz", read_prompts(request), folder.path / request.layout
                write_layout(request.layout, *where, watch)
        watch(WAITING)
        hosts.barrier("samples.npz is there")
    if not first:
        return "", None
    total = evaluations(folder.path).sum(axis=1)
    spread = f" ({total.min()} to {total.max()})" if total.min() != total.max() else ""
    report = (
        f"Wrote {made} images{' here' if jax.process_count() > 1 else ''} ({folder.count} in all), "
        f"step {job.settings['step']}, guidance {job.settings['guidance_scale']}, "
        f"{job.settings['solver']}, {total.mean():.4g} evaluations per image{spread}: "
        f"{folder.path / 'grid.png'}"
    )
    return report, float(np.median(seconds)) if seconds else None


def evaluations(folder: epath.PathLike) -> Int[np.ndarray, "n stages"]:
    """Return the evaluations per image and stage from a finished output folder."""
    return arrays.read_npz(epath.Path(folder) / "samples.npz", "nfe")


def _make(
    request: Request, job: jobs.Job, folder: OutputFolder, watch: Callable[[str], None]
) -> tuple[int, list[float]]:
    """Generate this process's share of the missing images.

    Returns:
      Their number, and the seconds per image of every batch except the first.
    """
    mesh = image_mesh(jax.local_devices(), request.context or 1)
    groups = mesh.shape[AXIS]
    size = -(-job.batch_size // groups) * groups  # the same number on every device
    params = jax.device_put(job.params, NamedSharding(mesh, P()))
    generate = make_generate(job.sampler, job.start, mesh)
    mine = chunks(folder.count, size, jax.process_index(), jax.process_count())
    missing = folder.missing()
    parts = [part for chunk in mine if len(part := chunk[np.isin(chunk, missing)])]
    made, seconds = 0, []
    quiet = jax.process_index() != 0
    with tqdm(total=sum(map(len, parts)), unit="image", dynamic_ncols=True, disable=quiet) as bar:
        for chosen in parts:
            watch(f"{'' if made else f'{STARTING}: '}image {chosen[0]}")  # the first batch compiles
            begin = time.perf_counter()
            padded = np.resize(chosen, size)  # one shape, so one compilation
            inputs = job.start.inputs(padded), *job.conditions.of(padded)
            if not (made or quiet):
                bar.write("Compiling the sampler", sys.stderr)
            out = generate(params, *inputs)
            if not (made or quiet):
                bar.write(f"Compiled in {time.perf_counter() - begin:.1f} s", sys.stderr)
            out = jax.device_get(out if request.save_stages else out._replace(stages=[]))
            seconds.append((time.perf_counter() - begin) / size)
            jobs.check_finite(out.finite, padded)
            if request.save_stages:
                for i, number in enumerate(chosen):
                    strip = [*(stage[i] for stage in out.stages), out.pixels[i]]
                    save_strip(folder.path / "stages" / f"{number:06d}.png", strip)
            folder.write(chosen, {"arr_0": out.pixels[: len(chosen)], "nfe": out.nfe[: len(chosen)]})
            made += len(chosen)
            bar.update(len(chosen))
    return made, seconds[1:]


def invert(request: Request) -> str:
    """Write the noise from which the sampler generates the images of `invert`; return the report.

    Raises UserError if the request does not fit the checkpoint, or the output folder holds files.
    """
    if files.list_files(request.out):
        raise UserError(f"--out={request.out} already holds files; use a new folder")
    if jax.process_count() > 1:
        raise UserError("--invert runs in one process")
    found, _ = starts.read_pictures(request.invert, "invert")
    params, config, meta = load_params(request.checkpoint, request.ema)
    sampler = jobs.sampler_of(request, config)
    if sampler.model.intervals:
        raise UserError("--invert needs a velocity, and a distilled model has only averages of it")
    if config.model.num_classes and not request.labels:
        raise UserError("--invert needs the class of each image: --labels=3, or --labels=3,7 cyclically")
    conditions = read_conditions(request, config, None, meta, len(found))
    clean = np.stack([fit_image(x, sampler.height, sampler.width) for x in found])

    @jax.jit
    def inverted(params, clean, *conditions):
        conditions = [encode_text(sampler.model, params, c) for c in conditions]
        return starts.invert(sampler, params, clean, *conditions)

    parts, size = [], min(request.batch_size or BATCH, len(found))
    for chosen in chunks(len(found), size, 0, 1):
        padded = np.resize(chosen, size)
        noise = inverted(params, clean[padded], *conditions.of(padded))
        parts.append([np.asarray(x)[: len(chosen)] for x in (noise.start, *noise.blocks)])
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    if not all(np.isfinite(part).all() for part in joined):
        raise UserError("the inversion is not finite; try --dtype=float32, or smaller --rtol and --atol")
    names = ["start", *(f"block_{stage}" for stage in range(1, len(joined)))]
    path = epath.Path(request.out) / "noise.npz"
    written = dict(zip(names, joined, strict=True)) | conditions.extra
    arrays.write_npz(path, written)
    return (
        f"Inverted {len(found)} images, step {meta['step']}, {sampler.solver}: {path}. "
        f"Back: --from_noise={path} with the same solver and guidance"
    )
