"""What a run says while it trains: a progress bar, metrics.jsonl and TensorBoard."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from pixelflow_jax import files

FINITE = ("loss", "grad_norm", "param_norm")  # a run stops when one of these is not


class TrainingDiverged(RuntimeError):
    """A step's loss, gradient or parameters were NaN or infinite."""


class Metrics:
    """Collects the device's metrics of every step without waiting, and reports them at times.

    Metrics stay on the device until `flush`, so that the host can run ahead of it.
    """

    def __init__(self, workdir: epath.Path, first_step: int, last_step: int, batch_size: int):
        self._path = workdir / "metrics.jsonl"
        self._drop_rows_after(first_step)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))
        self._batch_size = batch_size
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._since = time.perf_counter()
        self._paused = 0.0
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            initial=first_step, total=last_step, unit="step", mininterval=interval, dynamic_ncols=True
        )

    def _drop_rows_after(self, step: int) -> None:
        """Removes what a run that was killed noted after its last checkpoint: it comes again."""
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
            if kept != lines:
                files.write_bytes(self._path, "".join(kept).encode())

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Notes the metrics of update number `step` (the first is 1)."""
        self._pending.append((step, metrics))

    def check(self) -> list[tuple[int, dict[str, Any]]]:
        """Waits for the pending steps and returns them.

        Raises:
          TrainingDiverged: names the first step with a number that is not finite.
        """
        self._pending = jax.device_get(self._pending)
        for step, metrics in self._pending:
            for name in FINITE:
                if not np.isfinite(metrics[name]):
                    raise TrainingDiverged(
                        f"{name} was {metrics[name]} at step {step}; try a lower "
                        f"--config.optimizer.learning_rate or a longer warm-up"
                    )
        return self._pending

    def flush(self) -> None:
        """Writes the means over the steps since the last flush, and moves the progress bar."""
        pending = self.check()
        if not pending:
            return
        now = time.perf_counter()
        seconds = now - self._since - self._paused
        step = pending[-1][0]
        means = {
            name: np.mean([metrics[name] for _, metrics in pending], axis=0).tolist()
            for name in pending[0][1]
        }
        means["images_per_s"] = len(pending) * self._batch_size / seconds
        files.append_line(self._path, files.json_line({"step": step, **means}))
        for name, value in means.items():
            entries = enumerate(value) if isinstance(value, list) else [("", value)]
            for index, entry in entries:
                self._tensorboard.add_scalar(f"{name}/{index}".rstrip("/"), entry, step)
        self._bar.set_postfix_str(
            f"loss {means['loss']:.4f}, {means['images_per_s']:.0f} images/s", refresh=False
        )
        self._bar.update(step - self._bar.n)
        self._pending, self._since, self._paused = [], now, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time spent in its block (samples, checkpoints) out of images_per_s."""
        jax.block_until_ready(self._pending)  # steps still under way are not part of the pause
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def say(self, message: str) -> None:
        """Prints a line without breaking the progress bar."""
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Closes the bar and the TensorBoard file."""
        self._bar.close()
        self._tensorboard.close()
