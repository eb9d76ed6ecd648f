"""Time single components side by side in one run: attention, packing, compilation.

    python benchmarks/micro.py [--torch_python=PYTHON] [--only attention]

Reports medians of interleaved runs in float32. `--torch_python`, an interpreter with torch, adds torch's
SDPA. For the loader, see data.py.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pixelflow_jax.cascade.packing import Group, PackLayout
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.models.attention import attention
from pixelflow_jax.models.conditioning import init_params

HEADS, HEAD_DIM = 6, 64
TORCH = f"""
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
for line in sys.stdin:
    length, backward = map(int, line.split())
    shape = (1, {HEADS}, length, {HEAD_DIM})
    q, k, v = (torch.randn(shape, requires_grad=bool(backward)) for _ in range(3))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        if backward:
            out.sum().backward()
        seconds.append(time.perf_counter() - begin)
    print(json.dumps(min(seconds[1:])), flush=True)
"""


class Torch:
    """torch's SDPA in a separate process."""

    def __init__(self, python: str):
        command = [python, "-c", TORCH, str(len(os.sched_getaffinity(0)))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, length: int, backward: bool) -> float:
        """Return the seconds of the faster of two runs."""
        self.process.stdin.write(f"{length} {int(backward)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def seconds(function: Callable) -> float:
    """Return the seconds of the faster of two runs, as for torch."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return min(times)


def medians(functions: dict[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """Return the median of the seconds that each function returns, called in alternation."""
    found = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            found[name].append(function())
    return {name: statistics.median(times) for name, times in found.items()}


def table(head: list[str], body: list[list[str]]) -> None:
    """Print a Markdown table."""
    for row in (head, ["---"] * len(head), *body):
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def time_attention(runs: int, torch: Torch | None) -> None:
    """Time our backends, JAX's attention and torch's by length, with and without the backward pass."""
    print(f"\nAttention of one sequence, {HEADS} heads of {HEAD_DIM}: ms, and GFLOP/s\n")
    body = []
    for length in (64, 256, 1024, 4096):
        keys = jax.random.split(jax.random.key(0), 3)
        qkv = [jax.random.normal(key, (1, length, HEADS, HEAD_DIM)) for key in keys]
        for backward in (False, True):
            run = {"jax.nn.dot_product_attention": jax.nn.dot_product_attention}
            run |= {n: functools.partial(attention, backend=n) for n in ("einsum", "blockwise")}
            if length == 4096 and backward:
                del run["einsum"]  # the same computation as JAX's

            def timed(function, qkv=qkv, backward=backward):
                if backward:
                    function = jax.grad(lambda *qkv, f=function: f(*qkv).sum(), (0, 1, 2))
                call = functools.partial(jax.jit(function), *qkv)
                jax.block_until_ready(call())
                return functools.partial(seconds, call)

            functions = {name: timed(function) for name, function in run.items()}
            if torch:
                functions["torch SDPA"] = functools.partial(torch.seconds, length, backward)
            products = 7 if backward else 2
            work = products * 2 * length**2 * HEADS * HEAD_DIM / 1e9
            for name, found in medians(functions, runs).items():
                way = "forward and backward" if backward else "forward"
                body.append([str(length), way, name, f"{1e3 * found:.2f}", f"{work / found:.0f}"])
    table(["length", "what", "backend", "ms", "GFLOP/s"], body)


def time_packing(runs: int) -> None:
    """Time a packed row of several sizes against its groups one by one."""
    print("\nA packed row against its images group by group, forward of `imagenet256_b` at depth 2\n")
    config = load_config("imagenet256_b", ["model.depth=2", "dtype=float32", "model.remat=none"])
    model = build_model(config)
    params = jax.jit(lambda: init_params(model, 0))()
    p = model.base_patch
    groups = [Group(1, side, side, p) for side in (8, 16, 32, 64)]

    def forward(layout):
        tokens = [jnp.ones((1, group.count, group.length, 3 * p**2)) for group in layout.groups]
        zeros = jnp.zeros((1, layout.num_sequences))
        run = jax.jit(
            lambda p: model.apply({"params": p}, tokens, zeros, layout, zeros.astype(jnp.int32))
        )
        jax.block_until_ready(run(params))
        return lambda: run(params)

    packed, alone = forward(PackLayout(tuple(groups))), [forward(PackLayout((g,))) for g in groups]
    found = medians(
        {
            "packed": lambda: seconds(packed),
            "one by one": lambda: seconds(lambda: [run() for run in alone]),
        },
        runs,
    )
    table(["how", "ms"], [[name, f"{1e3 * s:.0f}"] for name, s in found.items()])


def time_compilation() -> None:
    """Time the first call of the train step, which traces and compiles, for configs that run here."""
    from official import our_config, our_train

    print("\nFirst call of the train step, including tracing and compilation\n")
    body = []
    for name in ("digits", "fashion", "official.py's shape"):
        config = our_config([]) if " " in name else load_config(name)
        begin = time.perf_counter()
        our_train(config)()
        body.append([name, f"{time.perf_counter() - begin:.1f}"])
    table(["config", "s"], body)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch_python", help="an interpreter with torch")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=("attention", "packing", "compile"))
    args = parser.parse_args()
    torch = Torch(args.torch_python) if args.torch_python else None
    if args.only in (None, "attention"):
        time_attention(args.runs, torch)
    if args.only in (None, "packing"):
        time_packing(args.runs)
    if args.only in (None, "compile"):
        time_compilation()


if __name__ == "__main__":
    main()
