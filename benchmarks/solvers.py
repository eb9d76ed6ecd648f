"""Compare the ODE solvers on a trained checkpoint: order, error by evaluations and by cost, speed.

    python benchmarks/solvers.py --checkpoint=runs/digits --out=docs/solvers_measured.md

Errors are root-mean-square differences between the final image and a tight solution (150 dopri5 steps
per stage), over all stages, in float64, at the config's guidance. `--quality` adds the judges of
quality.py on 1000 samples.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pixelflow_jax.sampling import solvers
from pixelflow_jax.sampling.generate import build_sampler, make_generate
from pixelflow_jax.sampling.grids import TimeGrid
from pixelflow_jax.sampling.sampler import class_conditions
from pixelflow_jax.sampling.starts import FromSeed, image_keys
from pixelflow_jax.training.checkpoints import load_params

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from diffrax_fixed import solve_fixed_diffrax

# Steps per stage from which the error decreases at the solver's order
ORDER_STEPS = {
    "euler": 256,
    "heun": 512,
    "midpoint": 512,
    "ralston": 512,
    "ab2": 512,
    "bosh3": 512,
    "dopri5": 512,
}
LINES: list[str] = []


def say(line: str = "") -> None:
    """Print a line and keep it for --out."""
    print(line, flush=True)
    LINES.append(line)


def table(head: list[str], body: list[list[str]]) -> None:
    """Print a Markdown table."""
    say("| " + " | ".join(head) + " |")
    say("| " + " | ".join("---" for _ in head) + " |")
    for row in body:
        say("| " + " | ".join(row) + " |")
    say()


class Trial:
    """A checkpoint in float64 with fixed noise, and its tight solution."""

    def __init__(self, checkpoint: str, count: int):
        params, config, _ = load_params(checkpoint)
        self.config = config
        sampler = build_sampler(config)
        self.noise = sampler.draw_noise(image_keys(1, jnp.arange(count)))
        self.labels = jnp.arange(count) % config.model.num_classes
        self.params, self.sampler = params, sampler
        wide = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
        self.params64, self.noise64 = wide(params), wide(self.noise)
        model = sampler.model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        self.sampler64 = dataclasses.replace(sampler, model=model, step_control="fixed")
        self.flops = sampler.stage_flops()

    @functools.cached_property
    def truth(self) -> np.ndarray:
        """The tight solution, float64."""
        return self.image("dopri5", (150,))

    def image(self, solver: str, steps: tuple[int, ...], kind: str = "uniform", only: int | None = None):
        """Return the final images (or the first `only` of them), float64."""
        sampler = dataclasses.replace(self.sampler64, solver=solver, grid=TimeGrid(steps, kind))
        with jax.enable_x64(True):
            noise = jax.tree.map(lambda x: x[:only], self.noise64)
            conditions = class_conditions(self.labels[:only], sampler.model.num_classes)
            return np.asarray(jax.jit(sampler.sample)(self.params64, noise, *conditions)[-1])

    @functools.cache  # noqa: B019
    def error(self, solver: str, steps: tuple[int, ...], kind: str = "uniform") -> float:
        """Return the root-mean-square error of the final images."""
        return float(np.sqrt(np.mean(np.square(self.image(solver, steps, kind) - self.truth))))

    def cost(self, solver: str, steps: tuple[int, ...]) -> tuple[int, float]:
        """Return (evaluations, GFLOP) per image."""
        steps = TimeGrid(steps).steps(len(self.flops))
        evaluations = np.array(steps) * solvers.evaluations_per_step(solver)
        return int(evaluations.sum()), float(evaluations @ self.flops) / 1e9


def orders(trial: Trial) -> None:
    """Measure each solver's order: the slope of the global error over the number of steps."""
    say("## Order of convergence")
    say(
        "Two images, the whole cascade, float64: log2 of |x(n) - x(2n)| / |x(2n) - x(4n)|. Bound: "
        "within 0.25 of the order. The orders appear only with this many steps, because the time "
        "embedding turns by one radian per unit of T, and a stage spans hundreds of units.\n"
    )
    body = []
    for solver, count in ORDER_STEPS.items():
        order, x = solvers.ORDERS[solver], [trial.image(solver, (count * k,), only=2) for k in (1, 2, 4)]
        first, second = (np.sqrt(np.mean(np.square(a - b))) for a, b in ((x[0], x[1]), (x[1], x[2])))
        slope = np.log2(first / second)
        met = "met" if abs(slope - order) <= 0.25 else "NOT met"
        body.append([solver, str(order), f"{slope:.2f}", str(count), f"{second:.1e}", met])
    table(["solver", "order", "slope", "n", "x(2n) - x(4n)", ""], body)


def grids(trial: Trial, judge) -> None:
    """Compare `uniform` with `reference` at equal numbers of steps."""
    say("## The grid: `uniform` against `reference` at the same number of evaluations")
    head = ["Euler steps per stage", "error uniform", "error reference", "reference / uniform"]
    body = []
    for count in (5, 10, 20, 30):
        errors = [trial.error("euler", (count,), kind) for kind in ("uniform", "reference")]
        row = [str(count), *(f"{e:.4f}" for e in errors), f"{errors[1] / errors[0]:.3f}"]
        if judge:
            row += [judge("euler", count, kind) for kind in ("uniform", "reference")]
        body.append(row)
    if judge:
        head += ["uniform: accuracy, Frechet, nearest", "reference: the same"]
    table(head, body)


def needed(trial: Trial) -> None:
    """Find the fewest evaluations that reach the error of 30 Euler steps per stage, for each solver."""
    goal, (nfe30, cost30) = trial.error("euler", (30,)), trial.cost("euler", (30,))
    say("## Evaluations needed for the error of 30 Euler steps per stage")
    say(f"That error is {goal:.2e}, at {nfe30} evaluations and {cost30:.1f} GFLOP per image.\n")
    body = [["euler", "30", str(nfe30), f"{goal:.1e}", "1.00", "1.00"]]

    for solver in ("heun", "midpoint", "ralston", "ab2", "bosh3", "dopri5", "tsit5", "dopri8"):
        count = next((n for n in range(1, 31) if trial.error(solver, (n,)) <= goal), None)
        if count is None:
            body.append([solver, "over 30", "", "", "", ""])
        else:
            (nfe, cost), error = trial.cost(solver, (count,)), trial.error(solver, (count,))
            shares = f"{nfe / nfe30:.2f}", f"{cost / cost30:.2f}"
            body.append([solver, str(count), str(nfe), f"{error:.1e}", *shares])
    table(["solver", "steps per stage", "evaluations", "error", "of Euler's", "of its FLOPs"], body)


def adaptive_costs(trial: Trial) -> None:
    """Measure error and evaluations of error-controlled steps, per image and per batch."""
    say("## Error-controlled steps (float32)")
    body = []
    for solver in ("heun", "bosh3", "dopri5", "tsit5", "dopri8"):
        for control in ("per_image", "per_batch"):
            for rtol in (1e-2, 1e-3):
                sampler = dataclasses.replace(
                    trial.sampler, solver=solver, step_control=control, rtol=rtol, atol=rtol
                )
                conditions = class_conditions(trial.labels, sampler.model.num_classes)
                run = jax.jit(sampler.run)(trial.params, trial.noise, *conditions)
                error = float(np.sqrt(np.mean(np.square(np.asarray(run.ends[-1]) - trial.truth))))
                nfe = np.asarray(run.nfe).sum(1)
                body.append([solver, control, f"{rtol:g}", f"{nfe.mean():.1f}", f"{error:.1e}"])
    table(["solver", "step_control", "rtol = atol", "mean evaluations", "error"], body)


def medians(functions, x, repeats: int, block: int) -> list[float]:
    """Return the median seconds of each function, called in alternation, `block` times in a row.

    The first call after a call of another program takes longer (50 us here), for any program.
    """
    times = [[] for _ in functions]
    for _ in range(repeats):
        for kept, function in zip(times, functions, strict=True):
            jax.block_until_ready(function(x))
            begin = time.perf_counter()
            for _ in range(block):
                jax.block_until_ready(function(x))
            kept.append((time.perf_counter() - begin) / block)
    return [float(np.median(kept)) for kept in times]


def speed(trial: Trial, repeats: int) -> None:
    """Compare the fixed loop with Diffrax's fixed steps, side by side, by field, batch and solver."""
    say("## The fixed loop against Diffrax with the same fixed steps (float32, ratios of medians)")
    say("400 steps of the small fields, so that the call overhead is negligible; 20 of the network.\n")
    body = []
    both = (solvers.solve_fixed, solve_fixed_diffrax)

    def compare(name: str, make_field, params, x, solver: str, steps: int) -> None:
        taus, block = np.linspace(0, 1, steps + 1), 5 if steps > 20 else 1

        def jitted(solve):
            run = jax.jit(lambda params, x: solve(solver, make_field(params), x, taus))
            return functools.partial(run, params)

        loop, rival = medians([jitted(solve) for solve in both], x, repeats, block)
        body.append([name, str(len(x)), solver, f"{loop / steps * 1e6:.3g} us", f"{rival / loop:.2f}"])

    def layer(weight):
        return lambda y, tau: jnp.tanh(y @ weight + tau)

    names = ("euler", "heun", "ab2", "dopri5")
    for width, count in ((16, 1), (16, 4), (64, 1), (64, 4), (256, 1), (256, 4)):
        weight = jax.random.normal(jax.random.key(0), (width, width)) / width**0.5
        for solver in names:
            compare(f"one layer of {width}", layer, weight, jnp.ones((count, width)), solver, 400)
    grid = trial.sampler.grid.stage(trial.sampler.cascade, 0)
    for count in (1, 16):
        conditions = class_conditions(trial.labels[:count], trial.sampler.model.num_classes)

        def network(params, conditions=conditions):
            return trial.sampler.field(params, grid, 1.2, *conditions)

        for solver in names:
            compare("the network", network, trial.params, trial.noise.start[:count], solver, 20)
    table(["field", "batch", "solver", "loop, per step", "Diffrax / loop"], body)


def quality_judge(trial: Trial):
    """Return a function (solver, steps, grid) -> the three metrics of quality.py on 1000 samples."""
    from quality import Judge

    judge, start = Judge(trial.config), FromSeed(1000)

    def numbers(solver: str, count: int, kind: str) -> str:
        sampler = dataclasses.replace(
            trial.sampler, solver=solver, grid=TimeGrid((count,), kind), step_control="fixed"
        )
        generate, parts = make_generate(sampler, start), []
        classes = trial.config.model.num_classes
        labels = np.arange(1000, dtype=np.int32) % classes
        for begin in range(0, 1000, 250):
            index = np.arange(begin, begin + 250)
            conditions = class_conditions(labels[index], classes)
            parts.append(jax.device_get(generate(trial.params, start.inputs(index), *conditions).pixels))
        scores = judge.scores(np.concatenate(parts), labels)
        return f"{scores['accuracy']:.1%}, {scores['frechet']:.2f}, {scores['nearest']:.2f}"

    return numbers


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15, help="timings of each function")
    parser.add_argument("--only", choices=("orders", "grids", "needed", "adaptive", "speed"))
    parser.add_argument("--quality", action="store_true", help="also judge 1000 samples of each grid")
    parser.add_argument("--out", help="Markdown file to write")
    args = parser.parse_args()
    trial = Trial(args.checkpoint, args.num_images)
    parts = {
        "orders": lambda: orders(trial),
        "grids": lambda: grids(trial, quality_judge(trial) if args.quality else None),
        "needed": lambda: needed(trial),
        "adaptive": lambda: adaptive_costs(trial),
        "speed": lambda: speed(trial, args.repeats),
    }
    for name, run in parts.items():
        if args.only in (None, name):
            run()
    if args.out:
        pathlib.Path(args.out).write_text("\n".join(LINES) + "\n")


if __name__ == "__main__":
    main()
