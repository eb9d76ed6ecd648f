"""Throws damaged and absurd input at every surface, and counts what is not a clear error.

    python tests/fuzz.py --cases=10000                   in process, every surface
    python tests/fuzz.py --cases=200 --processes         as commands
    python tests/fuzz.py --surface=png --seed=7 --first=123 --cases=1     one case again

A case is fine if it ends with a UserError of one line (or is accepted), within TIMEOUT seconds, and no
file has come but below the case's own output folder. Accepted input is not worked off in process: the
commands stop where the work would begin. Prints a Markdown table; exits with 1 if a case was not fine.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import numpy as np
import yaml

from pixelflow_jax import compile_check as compile_check_room
from pixelflow_jax import convert, doctor, encode, evaluate, pack, sample
from pixelflow_jax import demo as demo_room
from pixelflow_jax import train as train_room
from pixelflow_jax.common import UserError, arrays, sentence
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.requests import job, request
from pixelflow_jax.requests import run as run_room
from pixelflow_jax.requests.layouts import read_prompts_file
from pixelflow_jax.training.checkpoints import save_params

from conftest import TINY

TIMEOUT = 60
# fmt: off
WORDS = (
    "", "0", "1", "-1", "2", "3.5", "nan", "inf", "-inf", "1e9", "1e400", "10" * 30, "0x10", "1_0",
    "true", "None", "[]", "{}", "()", "(1,2)", "1,2,3", "0,0", ",", "a,b", "1,,2", "'", '"', "=", "--",
    "euler", "dopri5", "ab2", "float32", "bfloat16", "constant", "stagewise", "reference", "uniform",
    ".", "..", "/", "/dev/null", "/dev/full", "/proc/self/mem", "~", "a/../b", "no/such/file",
    "\x00", "\n", "\udcff", "ü", "💥", "%s%n", "$(true)", "`true`", "../../x", "gs://", "no://x",
    "v5e:4x4",
)
# fmt: on
Case = Callable[[random.Random, pathlib.Path], None]


class Reached(Exception):
    """Input was accepted: the work would begin."""


class Hung(Exception):
    """A case took longer than TIMEOUT."""


def reached(*args, **kwargs):
    raise Reached


def a_value(rng: random.Random, here: pathlib.Path) -> str:
    """A word, a number, or one of the files that are there."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(WORDS)
    if kind < 0.7:
        return str(
            rng.choice([rng.randint(-10, 300), rng.random(), rng.getrandbits(rng.choice([8, 64]))])
        )
    if kind < 0.9:
        return str(rng.choice(sorted((here.parent / "given").iterdir())))
    return "".join(rng.choice("abc019.,-=/ \t(){}[]:'\"\\") for _ in range(rng.randint(1, 30)))


def damage(rng: random.Random, data: bytes) -> bytes:
    """A file's bytes with one to three wounds."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place, size = rng.randrange(len(data) + 1), rng.randint(1, 64)
        kind = rng.randrange(6)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            del data[place : place + size]
        elif kind == 2:
            data[place:place] = rng.randbytes(size)
        elif kind == 3 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 4:  # too deep, or too long a number
            data[place:place] = rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000])
        else:
            data[place : place + size] = data[:size]
    return bytes(data)


def tangle(rng: random.Random, value):
    """A JSON value with something in it replaced, renamed or lost."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name, value = rng.choice(sorted(value)), dict(value)
        kind = rng.random()
        if kind < 0.1:
            del value[name]
        elif kind < 0.2:
            value[rng.choice(WORDS)] = value.pop(name)
        else:
            value[name] = tangle(rng, value[name])
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        place, value = rng.randrange(len(value)), list(value)
        value[place] = tangle(rng, value[place])
        return value
    odd = [None, True, [], {}, [1, 2], {"a": 1}, -1, 0, 10**30, 1e308, float("nan"), 2**63, 0.5]
    return rng.choice([*odd, rng.choice(WORDS), rng.randint(-5, 5000)])


# Command lines: the flags of each command, those that it needs among them more often than not.


def flags_of(parser: argparse.ArgumentParser, needed: dict[str, str]) -> Case:
    """Cases of a command's argv, as a list in `argv` of the function returned."""
    names = [a.option_strings[-1] for a in parser._actions if a.option_strings]

    def argv(rng: random.Random, here: pathlib.Path) -> list[str]:
        given = {name: value for name, value in needed.items() if rng.random() < 0.9}
        for _ in range(rng.randint(0, 4)):
            given[rng.choice(names)] = a_value(rng, here)
        if rng.random() < 0.1:
            given[rng.choice(["--nonsense", "positional", "-x", "--out", "--seed"])] = a_value(rng, here)
        return [f"{name}={value}" if rng.random() < 0.95 else name for name, value in given.items()]

    return argv


def parser_of(main: Callable) -> argparse.ArgumentParser:
    """The parser that a command builds."""
    from pixelflow_jax.common import cli

    caught, plain = [], cli.Parser.parse_args

    def catch(self, *args, **kwargs):
        caught.append(self)
        raise Reached

    cli.Parser.parse_args = catch
    try:
        main([])
    except Reached:
        pass
    finally:
        cli.Parser.parse_args = plain
    return caught[0]


CONFIG, RUN, OUT = "--config=configs/digits.py", "--checkpoint", "--out"
COMMANDS = {
    "train": (train_room.main, {"--config": "configs/digits.py", "--workdir": "out"}),
    "sample": (sample.main, {"--checkpoint": "../given/run", "--out": "out"}),
    "evaluate": (evaluate.main, {"--samples": "../given/samples.npz", "--out": "out/metrics.json",
                                 "--reference": "../given/samples.npz", "--features": "pca"}),
    "convert": (convert.main, {"--source": "../given/official", "--out": "out"}),
    "encode": (encode.main, {"--config": "configs/t2i_256.py", "--encoder": "../given", "--out": "out"}),
    "pack": (pack.main, {"--path": "../given/pictures", "--out": "out"}),
    "doctor": (doctor.main, {"--config": "configs/digits.py", "--workdir": "out"}),
    "compile_check": (compile_check_room.main, {"--config": "configs/digits.py", "--topology": "v4:2"}),
    "demo": (demo_room.main, {"--checkpoint": "../given/run", "--port": "0"}),
}  # fmt: skip
# Where each command's work begins
WORK = [
    *(
        (train_room, "train"),
        (run_room, "_make"),
        (run_room, "invert"),
        (convert, "save_params"),
    ),
    *((encode, "TextEncoder"), (doctor, "look"), (compile_check_room, "tpu_devices")),
    *((demo_room, "_gradio"), (evaluate, "Reference"), (evaluate.sweep, "run")),
]


def command(name: str) -> Case:
    """Cases of one command's flags."""
    main, needed = COMMANDS[name]
    argv = flags_of(parser_of(main), needed)

    def case(rng, here):
        case.argv = ["-m", f"pixelflow_jax.{name}", *argv(rng, here)]
        run_main(main, case.argv[2:])

    case.name = name
    return case


def run_main(main: Callable, argv: list[str]) -> None:
    """main(argv) with what it prints put aside."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(argv)


def config_override(rng: random.Random, here: pathlib.Path) -> None:
    """--config.KEY=VALUE for keys that are there and some that are not."""
    flat = [k for k in _flat(load_config("configs/digits.py").to_dict())]
    keys = [rng.choice([*flat, "model", "no.such", "", "data.", "__class__", "sample.solver.x"])
            for _ in range(rng.randint(1, 3))]  # fmt: skip
    argv = [f"--config.{key}={a_value(rng, here)}" for key in keys]
    config_override.argv = ["-m", "pixelflow_jax.train", CONFIG, "--workdir=out", *argv]
    run_main(train_room.main, config_override.argv[2:])


def _flat(values: dict, prefix: str = "") -> list[str]:
    return [
        name
        for key, value in values.items()
        for name in (_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
    ]


def checkpoint(rng: random.Random, here: pathlib.Path) -> None:
    """A checkpoint folder with a file damaged, lost or renamed, or its meta tangled."""
    run = here / "run"
    shutil.copytree(here.parent / "given" / "run", run)
    found = sorted(path for path in run.rglob("*") if path.is_file())
    for _ in range(rng.randint(1, 2)):
        path = rng.choice(found)
        if not path.exists():
            continue
        kind = rng.random()
        if kind < 0.1:
            path.unlink()
        elif kind < 0.2:
            path.rename(path.with_name(rng.choice(["x", "0", "checkpoint", path.name + "~"])))
        elif path.name in ("metadata", "config.json") and kind < 0.9:
            with contextlib.suppress(ValueError):
                path.write_text(json.dumps(tangle(rng, json.loads(path.read_text()))))
        else:
            path.write_bytes(damage(rng, path.read_bytes()))
    checkpoint.argv = ["-m", "pixelflow_jax.sample", f"{RUN}={run}", f"{OUT}=out", "--num_images=1"]
    job.prepare(request.parse("", checkpoint.argv[2:]))


def npz(rng: random.Random, here: pathlib.Path) -> None:
    """samples.npz and noise.npz with wounds."""
    name = rng.choice(["samples.npz", "noise.npz"])
    (here / name).write_bytes(damage(rng, (here.parent / "given" / name).read_bytes()))
    if name == "noise.npz":
        run = here.parent / "given" / "run"
        npz.argv = ["-m", "pixelflow_jax.sample", f"{RUN}={run}", f"{OUT}=out", f"--from_noise={name}"]
        run_main(sample.main, npz.argv[2:])
    else:
        npz.argv = ["-m", "pixelflow_jax.evaluate", f"--samples={name}", f"--reference={name}",
                    "--features=pca", "--out=out/m.json"]  # fmt: skip
        for _ in arrays.rows(here / name, "arr_0", 8):
            pass
        run_main(evaluate.main, npz.argv[2:])


def png(rng: random.Random, here: pathlib.Path) -> None:
    """A picture with wounds, or with settings that are tangled."""
    from PIL import Image

    from pixelflow_jax.sampling.generate import png_bytes, png_settings

    given = here.parent / "given" / "000000.png"
    if rng.random() < 0.3:
        data = damage(rng, given.read_bytes())
    else:
        settings = tangle(rng, png_settings(given))
        data = png_bytes(np.asarray(Image.open(given)), settings)
    (here / "x.png").write_bytes(data)
    run = here.parent / "given" / "run"
    png.argv = ["-m", "pixelflow_jax.sample", f"{RUN}={run}", f"{OUT}=out", "--from_png=x.png"]
    run_main(sample.main, png.argv[2:])


def official_yaml(rng: random.Random, here: pathlib.Path) -> None:
    """An official folder whose config.yaml or weights are damaged or tangled."""
    shutil.copytree(here.parent / "given" / "official", here / "official")
    path = here / "official" / "config.yaml"
    kind = rng.random()
    if kind < 0.7:
        path.write_text(yaml.safe_dump(tangle(rng, yaml.safe_load(path.read_text()))))
    elif kind < 0.85:
        path.write_bytes(damage(rng, path.read_bytes()))
    else:
        weights = next((here / "official").glob("*.safetensors"))
        weights.write_bytes(damage(rng, weights.read_bytes()))
    official_yaml.argv = ["-m", "pixelflow_jax.convert", "--source=official", f"{OUT}=out"]
    run_main(convert.main, official_yaml.argv[2:])


def prompts(rng: random.Random, here: pathlib.Path) -> None:
    """Files of prompts."""
    name = rng.choice(["p.txt", "p.jsonl"])
    lines = [json.dumps({"prompt": rng.choice(WORDS)}, ensure_ascii=True) for _ in range(3)]
    (here / name).write_bytes(damage(rng, "\n".join(lines).encode()))
    run = here.parent / "given" / "run"
    prompts.argv = ["-m", "pixelflow_jax.sample", f"{RUN}={run}", f"{OUT}=out", f"--prompts_file={name}"]
    read_prompts_file(name) if rng.random() < 0.9 else run_main(sample.main, prompts.argv[2:])


SURFACES: dict[str, Case] = {name: command(name) for name in COMMANDS}
SURFACES |= {"config": config_override, "checkpoint": checkpoint, "npz": npz, "png": png}
SURFACES |= {"config.yaml": official_yaml, "prompts": prompts}


def prepare(folder: pathlib.Path) -> None:
    """The folder `given`, with a whole one of everything."""
    from pixelflow_jax.models.conditioning import init_params
    from pixelflow_jax.sampling.generate import save_png

    given = folder / "given"
    given.mkdir()
    config = load_config("configs/digits.py", [*TINY, "model.depth=1"])
    save_params(given / "run", init_params(build_model(config), 0), config)
    run = f"{RUN}={given / 'run'}"
    run_main(sample.main, [run, f"{OUT}={folder / 's'}", "--num_images=4"])
    for name in ("samples.npz", "000000.png"):
        shutil.copy(folder / "s" / name, given / name)
    inverted = [f"--invert={given / '000000.png'}", "--labels=0"]
    run_main(sample.main, [run, f"{OUT}={folder / 'i'}", *inverted])
    shutil.copy(folder / "i" / "noise.npz", given / "noise.npz")
    run_main(convert.main, [f"--source={given / 'run'}", f"{OUT}={given / 'official'}", "--to=official",
                            "--format=safetensors"])  # fmt: skip
    for name in ("a", "b"):
        path = given / "pictures" / name / "0.png"
        path.parent.mkdir(parents=True)
        save_png(path, np.zeros((8, 8, 3), np.uint8))
    (given / "pictures" / "a" / "up").symlink_to("..")  # a folder in itself


def one_case(case: Case, name: str, number: int, seed: int, folder: pathlib.Path) -> tuple[str, str]:
    """("refused", "accepted" or what was wrong, details) of one case."""
    rng, here = random.Random(f"{name} {number} {seed}"), folder / "here"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    os.symlink(pathlib.Path(__file__).parents[1] / "configs", here / "configs")
    os.chdir(here)
    before = everything(folder)
    signal.alarm(TIMEOUT)
    try:
        case(rng, here)
        outcome = "accepted", ""
    except Reached:
        outcome = "accepted", ""
    except UserError as error:
        clear = len(str(error)) > 10 and sentence(error).isprintable()
        outcome = ("refused", "") if clear else ("unclear", repr(error))
    except OSError as error:
        outcome = "refused", str(error)
    except SystemExit as end:
        outcome = ("accepted", "") if end.code in (0, None) else ("exit", str(end.code))
    except Hung:
        outcome = "hung", traceback.format_exc()
    except Exception as error:
        known = isinstance(error, ImportError) and "gcsfs" in str(error)  # cli.run has a sentence for it
        outcome = ("refused", "") if known else ("crash", traceback.format_exc())
    finally:
        signal.alarm(0)
    new = [
        p for p in everything(folder) - before if not p.startswith("here/") and "__pycache__" not in p
    ]
    return ("stray file", " ".join(new)) if new else outcome


def everything(folder: pathlib.Path) -> set[str]:
    """All files below a folder, and the size of the given ones."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found.add(f"{path.relative_to(folder)} {path.stat().st_size}")
    return found


def as_process(case: Case, name: str, number: int, seed: int, folder: pathlib.Path) -> tuple[str, str]:
    """The same case as a command, if in process it was not accepted: that could be hours of work."""
    outcome = one_case(case, name, number, seed, folder)
    argv = getattr(case, "argv", [])
    if outcome[0] == "accepted" and "--help" not in argv or any(set("\x00\udcff") & {*a} for a in argv):
        return "not run", ""  # no shell could pass those two
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    before = everything(folder)
    command = [sys.executable, *argv]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=env)
    except subprocess.TimeoutExpired:
        return "hung", " ".join(argv)
    new, told = everything(folder) - before, ended.stderr.splitlines()
    if new:
        return "stray file", f"{argv}\n{new}"
    if ended.returncode == 0:
        return (
            ("accepted", "") if "--help" in argv else ("exit code 0", f"{argv}\n{ended.stdout[-500:]}")
        )
    if ended.returncode in (1, 2) and len(told) == 1 and told[0].startswith("error: "):
        return "refused", ""
    return "unclear", f"{argv}\n{ended.returncode}\n{ended.stderr[-2000:]}"


def hang(signum, frame):
    raise Hung


def fuzz(
    surfaces: list[str], cases: int, seed: int = 0, first: int = 0, processes: bool = False
) -> tuple[dict[str, collections.Counter], list[str]]:
    """(outcomes by surface, reports of cases that were not fine)."""
    signal.signal(signal.SIGALRM, hang)
    counts, reports, cwd = {}, [], os.getcwd()
    kept = [(room, name, getattr(room, name)) for room, name in WORK]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = pathlib.Path(temporary)
        os.chdir(pathlib.Path(__file__).parents[1])
        prepare(folder)
        for room, name, _ in kept:
            setattr(room, name, reached)
        try:
            for name in surfaces:
                counts[name] = collections.Counter()
                run, number = as_process if processes else one_case, first
                while counts[name].total() - counts[name]["not run"] < cases:
                    outcome, details = run(SURFACES[name], name, number, seed, folder)
                    counts[name][outcome] += 1
                    number += 1
                    if outcome not in ("accepted", "refused", "not run"):
                        reports.append(f"{name} case {number} seed {seed}: {outcome}\n{details}")
        finally:
            os.chdir(cwd)
            for room, name, function in kept:
                setattr(room, name, function)
    return counts, reports


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--surface", action="append", choices=SURFACES, help="default: all")
    parser.add_argument("--cases", type=int, default=1000, help="a surface (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", action="store_true", help="run each case as a command, too")
    args = parser.parse_args()
    bad = False
    for name in args.surface or SURFACES:
        counts, reports = fuzz([name], args.cases, args.seed, args.first, args.processes)
        for report in reports[:20]:
            print(report, file=sys.stderr)
        bad |= bool(reports)
        print(
            f"| {name} | " + ", ".join(f"{n} {what}" for what, n in sorted(counts[name].items())) + " |"
        )
        sys.stdout.flush()
    sys.exit(bad)


if __name__ == "__main__":
    main()
