"""Serve a page for the browser that samples from a checkpoint.

    pip install 'pixelflow_jax[demo]'
    python -m pixelflow_jax.demo --checkpoint=runs/digits

Shows every stage as it ends, keeps a history of the visit, and offers PNG files that carry their
settings: `python -m pixelflow_jax.sample --checkpoint=DIR --from_png=FILE --out=DIR2` makes the same
pixels. One request runs at a time; the others wait. Without --host, only this machine can open the page.
Visitors can use the processor and nothing else: there are no uploads, and no paths from the browser.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from pixelflow_jax.common import UserError, cli, optional
from pixelflow_jax.common.config_keys import check
from pixelflow_jax.config import build_cascade
from pixelflow_jax.pipeline import Pipeline, Samples
from pixelflow_jax.sampling.generate import save_png
from pixelflow_jax.sampling.guidance import SCHEDULES
from pixelflow_jax.sampling.sampler import STUDENT_STEPS
from pixelflow_jax.sampling.solvers import ORDERS, SOLVERS
from pixelflow_jax.text.encoder import trusted_encoder

KEPT = 24  # images in the history
VISITS = 256  # requests whose files are kept
WAITING = 16  # requests in the queue; further ones are refused
SHOWN = 192  # pixels per side to which small stages are enlarged
MAX_PROMPT = 1000  # characters
MAX_GUIDANCE = 20.0


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="workdir of a run, or the output of convert")
    parser.add_argument("--ema", type=float, help="decay of the average to use; 0 = raw parameters")
    parser.add_argument("--text_encoder", help="T5 folder or hub id (see `sample`)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s; 0 = any free port")
    parser.add_argument("--max_steps", type=int, default=100, help="per stage (default: %(default)s)")
    parser.add_argument("--max_images", type=int, default=4, help="per request (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, interval in dict(port="[0, 65535]", max_steps="[1, 1000]", max_images="[1, 64]").items():
        check(f"--{name}", getattr(args, name), interval)
    gradio = _gradio(args.host)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the images are deleted
    pipeline = Pipeline(args.checkpoint, args.ema)
    if args.text_encoder is None:
        trusted_encoder(pipeline.config.text.encoder, args.checkpoint)
    demo = Demo(pipeline, args)
    try:
        _, url, _ = demo.page(gradio).launch(
            server_name=args.host,
            server_port=args.port or None,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=1,  # in bytes: no uploads
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            footer_links=[],
        )
        print(f"Step {demo.pipeline.step} of {args.checkpoint}: {url} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(3600)
    except OSError:  # Gradio's message names its own settings
        raise UserError(
            f"cannot listen on --host={args.host} --port={args.port}: if it is taken, use --port=0 "
            f"for a free port"
        ) from None
    finally:
        shutil.rmtree(demo.folder, ignore_errors=True)


def _gradio(host: str):
    """Import Gradio, without its network calls. Raises UserError if it is not installed.

    Gradio checks its own page over HTTP, which must bypass proxies. Its HTTP library does not start if
    the environment names a SOCKS proxy and `socksio` is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    for name in ("NO_PROXY", "no_proxy"):
        known = [os.environ[name]] if os.environ.get(name) else []
        os.environ[name] = ",".join([*known, "127.0.0.1", "localhost", host])
    for name, proxy in list(os.environ.items()):
        if name.lower().endswith("_proxy") and proxy.lower().startswith("socks"):
            if importlib.util.find_spec("socksio") is None:
                del os.environ[name]
    return optional("gradio", "demo", "the page")


class Demo:
    """The state that all visitors share: the checkpoint and a folder of images."""

    def __init__(self, pipeline: Pipeline, limits: argparse.Namespace):
        self.pipeline, self.limits = pipeline, limits
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="pixelflow-demo-"))
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder / "served")
        self.text = pipeline.config.model.context_dim > 0
        self.num_stages = pipeline.config.cascade.num_stages

    def settings(self, what, negative, solver, schedule, guidance, seed, size, count, *steps) -> dict:
        """Return a visitor's settings for `Pipeline.stream`. Raises UserError if out of bounds.

        The page's controls have the same bounds, but a request need not come from the page.
        """
        bounds = [("guidance", guidance, 0, MAX_GUIDANCE), ("seed", seed, 0, 2**32 - 1)]
        bounds += [("the number of images", count, 1, self.limits.max_images)]
        bounds += [("the number of steps", n, 1, self.limits.max_steps) for n in steps]
        for name, value, least, most in bounds:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not least <= value <= most:
                raise UserError(f"{name} must lie between {least} and {most}")
        if size not in self.sizes() or solver not in SOLVERS or schedule not in SCHEDULES:
            raise UserError("choose the size, the solver and the schedule from their lists")
        width, height = map(int, size.split("x"))
        asked = dict(solver=solver, guidance_schedule=schedule, guidance_scale=guidance, seed=int(seed))
        asked |= dict(height=height, width=width, num_images=int(count), num_steps=list(map(int, steps)))
        if self.text:
            prompts = {"prompt": what, "negative_prompt": negative}
            for text in prompts.values():
                if not isinstance(text or "", str) or len(text or "") > MAX_PROMPT:
                    raise UserError(f"a prompt has at most {MAX_PROMPT} characters")
            if not (what or "").strip():  # not later: that message names the checkpoint's path
                raise UserError("say what the image should show")
            return asked | prompts | {"text_encoder": self.limits.text_encoder}
        labels = list(self._labels().values())
        if what not in labels or negative not in ["none", *labels]:
            raise UserError("choose the classes from their lists")
        negative = None if negative == "none" else int(negative)
        return asked | dict(labels=int(what), negative_labels=negative)

    def _labels(self) -> dict[str, str]:
        """Return the classes to choose from: displayed text -> number, as a string."""
        count = max(self.pipeline.config.model.num_classes, 1)
        names = self.pipeline.classes or {number: str(number) for number in range(count)}
        return {t if t == str(n) else f"{n}: {t}": str(n) for n, t in names.items()}

    def sizes(self) -> list[str]:
        """Return the selectable sizes as WIDTHxHEIGHT, trained size first, up to twice its pixels."""
        cascade, config = build_cascade(self.pipeline.config), self.pipeline.config
        side = config.data.resolution
        sides = (side // 2, 3 * side // 4, side, 3 * side // 2, 2 * side)
        found = [f"{side}x{side}"]
        for width, height in itertools.product(sides, sides):
            with contextlib.suppress(UserError):
                cascade.check_size(height, width, config.model.patch_size)
                if side**2 // 2 <= width * height <= 2 * side**2:
                    found.append(f"{width}x{height}")
        return list(dict.fromkeys(found))

    def stages(self, asked: dict[str, Any]) -> Iterator[tuple[list, str, Samples]]:
        """Yield (images with captions, a status line, the samples) at the end of every stage."""
        shown, begin = [], time.perf_counter()
        for number, made in enumerate(self.pipeline.stream(**asked), 1):
            seconds = time.perf_counter() - begin
            height, width = made.pixels.shape[1:3]
            caption = f"stage {number} of {self.num_stages}: {width}x{height}"
            scale = max(1, SHOWN // max(height, width))
            shown += [(x.repeat(scale, axis=0).repeat(scale, axis=1), caption) for x in made.pixels]
            total = made.nfe.sum(axis=1)
            yield shown, f"{caption}, {total.max()} evaluations, {seconds:.1f} s", made

    def keep(self, made: Samples) -> list[str]:
        """Write finished images as PNG files with their settings; return their paths."""
        for old in sorted(self.folder.glob("visit-*"))[: -VISITS + 1]:
            shutil.rmtree(old, ignore_errors=True)
        visit = self.folder / f"visit-{time.time_ns()}-{uuid.uuid4().hex}"
        visit.mkdir()
        paths = [str(visit / f"seed{x['seed']}_{x['first_image']}.png") for x in made.settings]
        for path, image, settings in zip(paths, made.pixels, made.settings, strict=True):
            save_png(path, image, settings)
        return paths

    def page(self, gr) -> Any:
        """Build the page from Gradio's blocks."""
        bar = gr.Progress()

        def generate(history, *values, progress=bar):
            try:
                asked = self.settings(*values)
                progress((0, self.num_stages), desc="stage 1 (a new choice is compiled first)")
                for shown, status, made in self.stages(asked):
                    number = made.nfe.shape[1]
                    progress((number, self.num_stages), desc=f"stage {number} is done")
                    yield shown, status, None, history, history
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from None
            paths = self.keep(made)
            new = [(path, describe(made.settings[i])) for i, path in enumerate(paths)]
            history = [*new, *history][:KEPT]
            yield shown, status, paths, history, history

        with gr.Blocks(
            title="pixelflow_jax", analytics_enabled=False, delete_cache=(3600, 86400)
        ) as page:
            gr.Markdown(
                f"## pixelflow_jax\nStep {self.pipeline.step} of a run; from noise to pixels in "
                f"{self.num_stages} stages."
            )
            with gr.Row():
                with gr.Column():
                    controls = self._controls(gr)
                    button = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Column():
                    stages = gr.Gallery(
                        label="Stages", elem_id="stages", columns=4, format="png", interactive=False
                    )
                    status = gr.Textbox(label="Status", elem_id="status", interactive=False)
                    files = gr.Files(
                        label="PNG files with their settings", elem_id="files", interactive=False
                    )
            past = gr.Gallery(
                label="History of this visit", elem_id="history", columns=6, interactive=False
            )
            history = gr.State([])
            outputs = [stages, status, files, past, history]
            button.click(generate, [history, *controls], outputs, api_visibility="private")
        return page.queue(max_size=WAITING, default_concurrency_limit=1)

    def _controls(self, gr) -> list:
        """Return the controls in the order of the arguments of `settings`."""
        sample, limits = self.pipeline.config.sample, self.limits
        distilled = bool(self.pipeline.config.distill.teacher)  # has its own solver and guidance
        free = dict(visible=not distilled)
        if self.text:
            what = gr.Textbox(label="Prompt", max_length=MAX_PROMPT, elem_id="prompt")
            named = dict(label="Negative prompt", elem_id="negative")
            negative = gr.Textbox(max_length=MAX_PROMPT, **named, **free)
        else:
            labels = list(self._labels().items())
            what = gr.Dropdown(labels, value=labels[0][1], label="Class", elem_id="class")
            labels = [("none", "none"), *labels]
            negative = gr.Dropdown(labels, value="none", label="Class to steer away from", **free)
        info = ", ".join(name for name in SOLVERS if ORDERS[name] > 2) + " choose their own steps"
        solvers, sizes = list(SOLVERS), self.sizes()
        named = dict(label="Solver", elem_id="solver", info=info)
        solver = gr.Dropdown(solvers, value=sample.solver, **named, **free)
        most, steps = limits.max_steps, np.resize(sample.num_steps, self.num_stages).tolist()
        with gr.Row():
            sliders = [
                gr.Dropdown([*STUDENT_STEPS], value=n, label=f"Steps, stage {i}")
                if distilled
                else gr.Slider(1, most, min(n, most), step=1, label=f"Steps, stage {i}")
                for i, n in enumerate(steps, 1)
            ]
        with gr.Row():
            scale = dict(value=sample.guidance_scale, step=0.1, label="Guidance", elem_id="guidance")
            guidance = gr.Slider(0, MAX_GUIDANCE, **scale, **free)
            schedules = [x for x in SCHEDULES if x != "reference" or self.num_stages <= 4]
            label = "Its schedule over the stages"
            schedule = gr.Dropdown(schedules, value=sample.guidance_schedule, label=label, **free)
        with gr.Row():
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", elem_id="seed")
            size = gr.Dropdown(sizes, value=sizes[0], label="Width x height", elem_id="size")
            count = gr.Slider(1, limits.max_images, value=1, step=1, label="Images")
        return [what, negative, solver, schedule, guidance, seed, size, count, *sliders]


def describe(settings: dict[str, Any]) -> str:
    """Return an image's settings in one line."""
    what = settings["prompts"][0] if "prompts" in settings else f"class {settings['labels'][0]}"
    steps = ",".join(map(str, settings["num_steps"]))
    how = settings["solver"] if settings["step_control"] != "fixed" else f"{settings['solver']} {steps}"
    return (
        f"{what}; {how}; guidance {settings['guidance_scale']} {settings['guidance_schedule']}; "
        f"seed {settings['seed']}; {settings['width']}x{settings['height']}"
    )


if __name__ == "__main__":
    cli.run(main)
