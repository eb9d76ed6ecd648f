"""What a run reports while it trains: a progress bar, metrics.jsonl and TensorBoard."""

import contextlib
import json
import sys
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import record_writer, summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from pixelflow_jax.common import Explained, files
from pixelflow_jax.common.hardware import PEAK_FLOPS
from pixelflow_jax.data.broken import BrokenImages
from pixelflow_jax.training.programs import Workload
from pixelflow_jax.training.writes import Journal

AHEAD = 3  # steps by which the host may run ahead of the devices
JOURNAL = "journal"
FINITE = ("loss", "grad_norm", "param_norm")  # a run stops when one of these is not finite


class TrainingDiverged(Explained):
    """A step's loss, gradient or parameters were NaN or infinite."""


class Metrics:
    """Collects the metrics of every step without waiting, and reports means.

    Metrics stay on the device until `flush` or `check`, so that the host can run ahead. Every process
    checks them; only the first one writes.

    Args:
      workdir: receives metrics.jsonl and tensorboard/.
      first_step, last_step: number of steps done so far, and of the whole run.
      workload: for the speeds.
      broken: receives the batches' entry "broken".
      pending: (step, metrics) up to `first_step` that no mean includes yet, from the checkpoint.
    """

    def __init__(
        self,
        workdir: epath.Path,
        first_step: int,
        last_step: int,
        workload: Workload,
        broken: BrokenImages,
        pending: Sequence[tuple[int, dict[str, Any]]] = (),
    ):
        self._path = workdir / "metrics.jsonl"
        self._workload, self._broken = workload, broken
        self._writes = jax.process_index() == 0
        self._pending = [(step, dict(numbers)) for step, numbers in pending]
        self._carried = len(self._pending)  # steps of an earlier process: they took no time here
        self._since, self._paused, self._waited = time.perf_counter(), 0.0, 0.0
        if self._writes:
            self._rows = Journal(self._path, self._rows_up_to(first_step))
            self._events = EventsWriter(f"{JOURNAL}:{workdir / 'tensorboard' / 'events'}")
            # TensorBoard discards what earlier files hold from here on
            self._event(first_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._bar = tqdm(
            initial=first_step,
            total=last_step,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
            disable=not self._writes,
        )

    def _rows_up_to(self, step: int) -> bytes:
        """Return metrics.jsonl up to `step`, and remove the rest: a resumed run repeats these steps."""
        try:
            lines = files.read_bytes(self._path).splitlines(keepends=True)
        except FileNotFoundError:
            return b""
        kept = [line for line in lines if line.endswith(b"}\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            files.write_bytes(self._path, b"".join(kept))
        return b"".join(kept)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Add the metrics of step number `step` (the first is 1).

        Wait until at most AHEAD steps are in flight, as each holds its batch in memory.
        """
        self._pending.append((step, metrics))
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD])

    def check(self) -> list[tuple[int, dict[str, Any]]]:
        """Wait for the pending steps and return (step, metrics) of each, as Python numbers.

        Raises:
          TrainingDiverged: for the first step with a metric that is not finite.
          UserError: if too many images are broken.
        """
        for place, (step, metrics) in enumerate(jax.device_get(self._pending)):
            metrics = {name: np.asarray(value).tolist() for name, value in metrics.items()}
            self._pending[place] = (step, metrics)
            self._broken.add(metrics.pop("broken", ()))
            for name in FINITE:
                if not np.isfinite(metrics[name]):
                    raise TrainingDiverged(
                        f"{name} was {metrics[name]} at step {step}; try a lower "
                        f"--config.optimizer.learning_rate or a longer warm-up"
                    )
        return self._pending

    def flush(self) -> None:
        """Write the means over the steps since the last flush, and move the progress bar."""
        pending = self.check()
        if not pending:
            return
        now = time.perf_counter()
        step = pending[-1][0]
        means = {
            name: np.mean([metrics[name] for _, metrics in pending], axis=0).tolist()
            for name in pending[0][1]
        }
        means |= self._speeds(len(pending) - self._carried, now - self._since)
        self._pending, self._carried = [], 0
        self._since, self._paused, self._waited = now, 0.0, 0.0
        if not self._writes:
            return
        self._rows.write((json.dumps({"step": step, **means}) + "\n").encode())
        self._rows.flush()
        for name, value in means.items():
            for index, entry in enumerate(value) if isinstance(value, list) else [("", value)]:
                self._event(step, summary=summary.scalar(f"{name}/{index}".rstrip("/"), entry))
        self._events.flush()
        self._bar.set_postfix_str(
            f"loss {means['loss']:.4f}, {means['images_per_s']:.0f} images/s", refresh=False
        )
        self._bar.update(step - self._bar.n)

    def _event(self, step: int, **what: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))

    def _speeds(self, steps: int, seconds: float) -> dict[str, float]:
        """Return rates over `steps` in `seconds`, without pauses; MFU where the chip's peak is known."""
        rate = steps / max(seconds - self._paused, 1e-9)
        tflops = rate * self._workload.flops / 1e12 / self._workload.devices
        speeds = {
            "images_per_s": rate * self._workload.images,
            "tokens_per_s": rate * self._workload.tokens,
            "tflops_per_device": tflops,
            "data_wait_share": self._waited / max(seconds, 1e-9),
        }
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        return speeds | ({"mfu": tflops * 1e12 / peak} if peak else {})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time spent in the block (samples, checkpoints) out of the speeds."""
        jax.block_until_ready([m for _, m in self._pending])  # steps in flight are not part of the pause
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent in the block as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def say(self, message: str) -> None:
        """Print a line above the progress bar, on the first process only."""
        if self._writes:
            self._bar.write(message, file=sys.stderr)

    def settle(self) -> None:
        """Wait until metrics.jsonl holds all that was flushed. A checkpoint needs this: after it, these
        steps are not repeated."""
        if self._writes:
            self._rows.settle()

    def close(self) -> None:
        """Close the bar and the files. Raises OSError if a file could not be written."""
        self._bar.close()
        if self._writes:
            self._events.close()
            self._rows.close()


record_writer.register_writer_factory(  # of tensorboardX's files whose names begin with JOURNAL
    JOURNAL, types.SimpleNamespace(open=lambda path: Journal(path.removeprefix(f"{JOURNAL}:")))
)
