"""A checkpoint in memory, for notebooks and the demo: `sample` without folders.

    import pixelflow_jax as pf
    model = pf.load("runs/digits")
    images = model.sample(labels=[3, 7], num_steps=20, guidance_scale=1.5, seed=1)

Settings are the flags of `python -m pixelflow_jax.sample`, with Python values. The images are those of
the command, bit for bit.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from pixelflow_jax.common import UserError, numerics
from pixelflow_jax.requests import job as jobs
from pixelflow_jax.requests.conditions import trained_classes
from pixelflow_jax.requests.output import chunks
from pixelflow_jax.requests.request import FROM_PYTHON, fill
from pixelflow_jax.sampling.generate import make_generate, make_stages

PROGRAMS = 16  # compiled ones to keep


class Samples(NamedTuple):
    """The images of a request, network evaluations per image and stage that was run, and settings.

    The settings of each image are those that its PNG file carries.
    """

    pixels: UInt8[np.ndarray, "n h w 3"]
    nfe: Int[np.ndarray, "n stages"]
    settings: list[dict[str, Any]]


class Pipeline:
    """A checkpoint that makes images.

    Attributes:
      config: of the run, as it was trained.
      params: the network's parameters, as `Sampler.run` takes them.
      classes: numbers and names of the classes that training saw; empty if the checkpoint keeps none.
      step: the training step of the parameters.
    """

    @numerics.pinned()
    def __init__(
        self,
        checkpoint: epath.PathLike,
        ema: float | None = None,
        lora: epath.PathLike | None = None,
        lora_scale: float = 1.0,
    ):
        """Read a workdir, one step's folder, or a folder that `convert` wrote.

        `ema` is an average's decay or half-life; 0 = the raw parameters, None = the first average.
        `lora` is a workdir of adapters that were trained on the checkpoint, `lora_scale` their weight.
        Raises UserError if that is not a checkpoint, or has no such average.
        """
        self._loaded, self._checkpoint = jobs.load(checkpoint, ema, lora, lora_scale), str(checkpoint)
        self._compiled: dict[Any, Any] = {}
        self.config, self.params = self._loaded.config, self._loaded.params
        self.classes = trained_classes(self._loaded.meta, self.config.model.num_classes)
        self.step = self._loaded.meta["step"]

    def sample(self, **settings: Any) -> UInt8[np.ndarray, "n h w 3"]:
        """Return images, uint8 [N, height, width, 3].

        Settings are those of `requests.request.Request`, such as labels=[3, "dog"] or prompt="a red two"
        (or a list), num_images, seed, solver, num_steps (one number, or one per stage), guidance_scale,
        height, width, batch_size. init_image is a path, a Pillow image, an array [H, W, 3], or a list of
        these. Raises UserError for settings that are unknown or do not fit the model.
        """
        return self.run(**settings).pixels

    @numerics.pinned()
    def run(self, **settings: Any) -> Samples:
        """Return what `sample` does, and what else is known of the images."""
        job = self._job(settings)
        generate = self._program(make_generate, job)
        parts = []
        for chosen in chunks(len(job.conditions), job.batch_size, 0, 1):
            padded = np.resize(chosen, job.batch_size)
            out = generate(job.params, job.start.inputs(padded), *job.conditions.of(padded))
            out = jax.device_get(out._replace(stages=[]))
            jobs.check_finite(out.finite, padded)
            parts.append((out.pixels[: len(chosen)], out.nfe[: len(chosen)]))
        pixels, nfe = map(np.concatenate, zip(*parts, strict=True))
        return Samples(pixels, nfe, [job.settings_of(i) for i in range(len(pixels))])

    def stream(self, **settings: Any) -> Iterator[Samples]:
        """Yield the images at the end of each stage as soon as it ends; the last equal those of `run`.

        All images are one batch.
        """
        ends = self._ends(settings)
        while True:
            with numerics.pinned():  # but not the caller's code between the stages
                end = next(ends, None)
            if end is None:
                return
            yield end

    def _ends(self, settings: dict[str, Any]) -> Iterator[Samples]:
        job = self._job(settings)
        count = len(job.conditions)
        job = dataclasses.replace(job, batch_size=max(count, job.batch_size))
        jobs.check_memory("num_images", job.batch_size, job.sampler, 4)
        run = self._program(make_stages, job)
        index, nfe = np.resize(np.arange(count), job.batch_size), []
        described = [job.settings_of(i) for i in range(count)]
        for end in run(job.params, job.start.inputs(index), *job.conditions.of(index)):
            jobs.check_finite(end.finite, index)
            nfe.append(np.asarray(end.nfe)[:count])
            yield Samples(np.asarray(end.pixels)[:count], np.concatenate(nfe, axis=1), described)

    def _job(self, settings: dict[str, Any]) -> jobs.Job:
        known = FROM_PYTHON - {"ema"}  # which `load` has settled
        for name in settings:
            if name not in known:
                raise UserError(f"{name} is not a setting; they are {', '.join(sorted(known))}")
        job = jobs.prepare(fill(checkpoint=self._checkpoint, **settings), self._loaded)
        jobs.check_memory("num_images", len(job.conditions), job.sampler, 1)
        return job

    def _program(self, make, job: jobs.Job):
        """Return the program of a job, compiled once for all seeds and conditions."""
        key = make, job.sampler, type(job.start), job.start.stage, job.start.tau
        if type(job.start).__name__ != "FromSeed":  # holds arrays, or seeds that are compiled in
            return make(job.sampler, job.start)
        program = self._compiled.pop(key, None) or make(job.sampler, job.start)
        self._compiled[key] = program  # the newest is last
        if len(self._compiled) > PROGRAMS:
            del self._compiled[next(iter(self._compiled))]
        return program


load = Pipeline  # as pf.load(CHECKPOINT)
