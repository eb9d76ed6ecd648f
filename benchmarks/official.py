"""Compare train step and sampler with the official implementation, side by side in one run on CPU.

    git clone https://github.com/ShoufaChen/PixelFlow /tmp/official
    python -m venv /tmp/theirs && /tmp/theirs/bin/pip install torch diffusers einops
    python benchmarks/official.py --checkout=/tmp/official --python=/tmp/theirs/bin/python

Both run in float32 on the same cores, in alternation. One JSON line per task reports the median of each
and the median ratio of the pairs. Corruption and packing, which the official code does in its loader,
are not counted there but are part of our step. The official flash-attention needs CUDA; torch's SDPA
replaces it for each run of sequences of equal length (official_worker.py), which is exact.

Most of a train step is matrix products, whose speed in XLA and in torch depends on the machine and the
hour. So both libraries' rates at the products of the step's MLP are measured beside it, and the ratio of
the steps is also given relative to that of the products.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable

from pixelflow_jax.common.memory import restart_with_huge_pages

SHAPE = dict(num_heads=6, head_dim=64, depth=6, patch_size=4, num_classes=1000, num_stages=4)
SHAPE |= dict(resolution=128, batch_size=16, num_samples=8, num_steps=10, guidance_scale=2.4)


class Official:
    """The official implementation in a separate process."""

    def __init__(self, python: str, checkout: str, threads: int, device: str = "cpu"):
        worker = os.path.join(os.path.dirname(os.path.abspath(__file__)), "official_worker.py")
        command = [python, worker, "--checkout", checkout, "--shape", json.dumps(SHAPE)]
        environ = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES"}
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads), "--device", device],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the process of the official implementation ended: see its message above")
        return json.loads(line)

    def run(self, task: str) -> float:
        """Return the seconds of one run of a task, such as "train" or "product 64 32 32"."""
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]


def our_config(overrides: list[str]):
    """Return the config for SHAPE in float32 on CPU."""
    from pixelflow_jax.config import load_config

    names = ("num_heads", "head_dim", "depth", "patch_size", "num_classes")
    keys = {f"model.{name}": name for name in names}
    keys |= {"cascade.num_stages": "num_stages", "data.resolution": "resolution"}
    keys |= {"batch_size": "batch_size", "sample.num_steps": "num_steps"}
    keys |= {"sample.guidance_scale": "guidance_scale"}
    shape = [f"{key}={SHAPE[name]}" for key, name in keys.items()]
    own = ["dtype=float32", "model.remat=none", "mesh.fsdp=1"]
    own.append(f"model.scan_unroll={SHAPE['depth']}")  # as in the configs for CPU
    return load_config("imagenet256_xl", [*shape, *own, *overrides])


def our_train(config) -> Callable[[], None]:
    """Return a function that runs one step of `make_train_step`."""
    import jax
    import numpy as np

    from pixelflow_jax.config import build_model
    from pixelflow_jax.distributed import sharding
    from pixelflow_jax.models.conditioning import init_params
    from pixelflow_jax.training import step
    from pixelflow_jax.training.optimizer import build_optimizer

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model, optimizer = build_model(config), build_optimizer(config)
    state = jax.jit(lambda: step.init_state(init_params(model, 0), optimizer))()
    train_step = step.make_train_step(config, model, optimizer, mesh)
    rng = np.random.default_rng(0)
    most = {"labels": config.model.num_classes}
    batch = {
        name: jax.device_put(rng.integers(0, most.get(name, 255), x.shape).astype(x.dtype))
        for name, x in step.abstract_batch(config, mesh).items()
    }

    def run():
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)

    return run


def our_sampler(config) -> Callable[[], None]:
    """Return a function that runs one call of `make_generate`."""
    import jax
    import numpy as np

    from pixelflow_jax.models.conditioning import init_params
    from pixelflow_jax.sampling.generate import build_sampler, make_generate
    from pixelflow_jax.sampling.sampler import class_conditions
    from pixelflow_jax.sampling.starts import FromSeed

    sampler, start = build_sampler(config), FromSeed(0)
    params = jax.jit(lambda: init_params(sampler.model, 0))()
    generate = make_generate(sampler, start)
    index = np.arange(SHAPE["num_samples"])
    conditions = class_conditions(index.astype(np.int32), SHAPE["num_classes"])
    return lambda: jax.block_until_ready(generate(params, start.inputs(index), *conditions))


def compare(task: str, official: Official, ours: Callable, images: int, runs: int) -> dict:
    """Run both in alternation, and return the medians of both and of their ratio.

    A step of training is timed right after another: after a pause of seconds, some machines have given
    freed memory back to their host, which a run without pauses never waits for.
    """
    begin = time.perf_counter()
    ours()
    compiled = time.perf_counter() - begin
    official.run(task)
    pairs, untimed = [], task == "train"
    for _ in range(runs):
        if untimed:
            official.run(task)
        theirs = official.run(task)
        if untimed:
            ours()
        begin = time.perf_counter()
        ours()
        pairs.append((theirs, time.perf_counter() - begin))
    line = dict(task=task, images=images, runs=runs)
    line["official_seconds"] = statistics.median(a for a, _ in pairs)
    line["our_seconds"] = statistics.median(b for _, b in pairs)
    line["official_images_per_s"] = images / line["official_seconds"]
    line["our_images_per_s"] = images / line["our_seconds"]
    line["ratio"] = statistics.median(a / b for a, b in pairs)
    line["our_first_call_seconds"] = compiled
    return line | official.versions


def product_shapes() -> list[tuple[int, int, int]]:
    """Return (m, k, n) of the MLP's products in a train step, forward and of the weights' gradients."""
    sides = [SHAPE["resolution"] // SHAPE["patch_size"] // 2**s for s in range(SHAPE["num_stages"])]
    tokens = SHAPE["batch_size"] // SHAPE["num_stages"] * sum(side**2 for side in sides)
    dim = SHAPE["num_heads"] * SHAPE["head_dim"]
    forward = [(tokens, dim, dim), (tokens, dim, 4 * dim), (tokens, 4 * dim, dim)]
    return forward + [(k, m, n) for m, k, n in forward]


def compare_products(official: Official, runs: int) -> dict:
    """Return both libraries' GFLOP/s at `product_shapes`, [m, k] x [k, n], run in alternation."""
    import jax
    import jax.numpy as jnp

    seconds = {"official": 0.0, "our": 0.0}
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    for m, k, n in product_shapes():
        keys = jax.random.split(jax.random.key(0))
        a, b = jax.random.normal(keys[0], (m, k)), jax.random.normal(keys[1], (k, n))
        pairs = []
        for _ in range(runs + 1):
            theirs = official.run(f"product {m} {k} {n}")
            begin = time.perf_counter()
            jax.block_until_ready(multiply(a, b))
            pairs.append((theirs, time.perf_counter() - begin))
        for name, column in zip(
            seconds, zip(*pairs[1:], strict=True), strict=True
        ):  # the first compiles
            seconds[name] += statistics.median(column)
    work = sum(2 * m * k * n for m, k, n in product_shapes()) / 1e9
    return {f"{name}_product_gflops": work / found for name, found in seconds.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", required=True, help="folder with the official repository")
    parser.add_argument("--python", required=True, help="an interpreter that can run it")
    parser.add_argument("--runs", type=int, default=9, help="pairs of train steps")
    parser.add_argument("--sample_runs", type=int, default=3, help="pairs of sampler calls")
    parser.add_argument("--only", choices=("train", "sample"))
    parser.add_argument("--config", action="append", default=[], help="KEY=VALUE for our config")
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    official = Official(args.python, args.checkout, threads)
    config = our_config(args.config)
    if args.only != "sample":
        found = compare("train", official, our_train(config), SHAPE["batch_size"], args.runs)
        found |= compare_products(official, args.runs)
        rates = found["our_product_gflops"] / found["official_product_gflops"]
        found |= {"ratio_to_that_of_products": found["ratio"] / rates, "load": os.getloadavg()[0]}
        print(json.dumps(found), flush=True)
    if args.only != "train":
        found = compare("sample", official, our_sampler(config), SHAPE["num_samples"], args.sample_runs)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    restart_with_huge_pages()  # as the commands do
    main()
