"""Check and measure everything on an accelerator, in parts of at most nine minutes.

    python benchmarks/accelerator.py --prepare=.card             # here: wheels, official code, emoji
    python benchmarks/accelerator.py correct train --out=DIR     # there; without a part, all of them
    python benchmarks/accelerator.py --rehearse --out=DIR        # every part, tiny, on the CPU

correct: recorded cases of the official code, every backend of attention against float64, one train step
and one sample of every config. train: images per second, TFLOP/s and MFU of `imagenet256_xl` and
`imagenet256_b`. switches: the same with XLA's. sample: seconds per image. official: the official code
beside ours. pictures: trains `emoji` and `fashion_p2`.

Each measurement is a process of its own (accelerator_cell.py), so that one which fails or needs too much
memory does not end the others. Lines of JSON come as they are measured and go to DIR/results.jsonl, the
tables at the end to DIR/results.md. A part whose time is over skips the rest of its measurements and
says so. Exit code 1 if anything of `correct` is wrong.
"""

import argparse
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
MINUTES = 9.0  # of a part
OFFICIAL = "https://github.com/ShoufaChen/PixelFlow"
# What an image with JAX, Flax, Optax, Orbax, Diffrax, PyTorch and transformers lacks
WHEELS = ["array-record", "diffusers", "grain", "importlib_resources", "ml_collections"]
WHEELS += ["portpicker", "tensorboardX"]
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
LARGEST = 64 << 20  # bytes that may travel

Cell = dict  # {"cell": name of a function in accelerator_cell.py, "env": {...}, **its arguments}


def train_cell(config: str, images: int, env: dict | None = None, **model) -> Cell:
    """Return a measurement of the train step of a config at a batch size."""
    overrides = [f"model.{name}={value}" for name, value in model.items()]
    overrides.append("accumulation_steps=1")
    return {
        "cell": "train",
        "config": config,
        "images": images,
        "overrides": overrides,
        "env": env or {},
    }


def sample_cell(images: int, label: str, steps: str, *more: str) -> Cell:
    """Return a measurement of XL's sampler."""
    chosen = [f"sample.num_steps={steps}", *more]
    return {"cell": "sample", "config": XL, "images": images, "overrides": chosen, "label": label}


def official_cell(task: str, batch: int) -> Cell:
    """Return a comparison with the official code, whose process needs memory on the same card."""
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {"cell": "official", "task": task, "batch": batch, "env": env}


XL, B = "imagenet256_xl", "imagenet256_b"
ONE_STEP = "sample.guidance_scale=1", "sample.guidance_schedule=constant"  # as a student samples
PARTS: dict[str, list[Cell]] = {
    "correct": [
        {"cell": "parity"},
        {"cell": "attention"},
        {"cell": "configs"},
    ],
    "train": [
        train_cell(XL, 64, remat="full"),
        train_cell(XL, 32, remat="none"),
        train_cell(XL, 64, remat="full", attention="einsum"),
        train_cell(XL, 128, remat="full"),
        train_cell(XL, 64, remat="dots"),
        train_cell(B, 256, remat="none"),
        train_cell(XL, 64, remat="none"),
        train_cell(XL, 64, remat="full", scan_unroll=28),
        train_cell(XL, 256, remat="full"),
        train_cell(XL, 256, remat="offload"),
        train_cell(B, 512, remat="none"),
    ],
    "switches": [
        train_cell(XL, 64, remat="full"),
        train_cell(XL, 64, {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}, remat="full"),
        train_cell(XL, 64, {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}, remat="full"),
        train_cell(XL, 64, {"JAX_OPTIMIZATION_LEVEL": "O1"}, remat="full"),
        train_cell(XL, 64, {"JAX_OPTIMIZATION_LEVEL": "O3"}, remat="full"),
        train_cell(
            XL, 64, {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true"}, remat="full"
        ),
    ],
    "sample": [
        sample_cell(64, "Euler, 30 steps per stage", "30"),
        sample_cell(64, "ab2, 15 steps per stage", "15", "sample.solver=ab2"),
        sample_cell(64, "few steps, 2-2-2-1", "2,2,2,1", *ONE_STEP),
        sample_cell(64, "few steps, 1-1-1-1", "1,1,1,1", *ONE_STEP),
        sample_cell(8, "Euler, 30 steps per stage", "30"),
        sample_cell(1, "Euler, 30 steps per stage", "30"),
        sample_cell(8, "few steps, 1-1-1-1", "1,1,1,1", *ONE_STEP),
        sample_cell(1, "few steps, 1-1-1-1", "1,1,1,1", *ONE_STEP),
    ],
    "official": [official_cell("train", 8), official_cell("sample", 4), official_cell("train", 16)],
    "pictures": [
        {"cell": "pictures", "config": "emoji", "share": 0.6},
        {"cell": "pictures", "config": "fashion_p2", "share": 1.0},
    ],
}
SMALLER = ["model.num_heads=2", "data.resolution=64"]  # for the rehearsal
TINY = [*SMALLER, "model.head_dim=16", "model.depth=2", "model.scan_unroll=1", "dtype=float32"]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of each part")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--prepare", metavar="FOLDER", help="fill a folder with all that must travel")
    parser.add_argument("--official", default=OFFICIAL, help="repository with the official code")
    parser.add_argument("--card", default=".card", help="the folder that --prepare filled")
    args = parser.parse_args()
    if args.prepare:
        return prepare(pathlib.Path(args.prepare), args.official)
    unknown = {*args.parts} - {*PARTS}
    if unknown or not args.out:
        parser.error(f"no part is called {', '.join(unknown)}" if unknown else "--out is missing")
    out = pathlib.Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("a") as file:
        found = [run_part(part, args, out, file) for part in args.parts or PARTS]
    lines = [line for part in found for line in part]
    text = tables(lines)
    (out / "results.md").write_text(text)
    print(text)
    if any(line.get("wrong") or (line["part"] == "correct" and "error" in line) for line in lines):
        sys.exit(1)


def run_part(part: str, args: argparse.Namespace, out: pathlib.Path, file) -> list[dict]:
    """Run the measurements of a part until its time is over; write and return what they found."""
    end, lines = time.monotonic() + 60 * args.minutes, []
    for cell in PARTS[part]:
        left = end - time.monotonic()
        if left < 20 and not args.rehearse:
            found = {"error": "skipped: the part's time is over"}
        elif args.rehearse and "xla_gpu" in cell.get("env", {}).get("XLA_FLAGS", ""):
            found = {"note": "not run: a GPU's switch"}
        else:
            found = run_cell(rehearsed(cell) if args.rehearse else cell, args, out, left)
        lines.append({"part": part, **cell, **found})
        print(json.dumps(lines[-1]), file=file, flush=True)
        print(json.dumps(lines[-1]), flush=True)
    return lines


def rehearsed(cell: Cell) -> Cell:
    """Return the measurement at a tiny shape."""
    smaller = [*TINY, *(["sample.num_steps=1"] if cell["cell"] == "sample" else [])]
    tiny = {"overrides": [*cell.get("overrides", []), *smaller], "rehearse": True}
    if cell["cell"] == "configs":
        tiny |= {"configs": ["digits_few", "imagenet256_xl_p8", "t2i_256"], "smaller": SMALLER}
    return {**cell, **tiny, **({"images": 8} if "images" in cell else {})}


def run_cell(cell: Cell, args: argparse.Namespace, out: pathlib.Path, seconds: float) -> dict:
    """Run a measurement in a process; return what it printed last, or why it has failed."""
    env = {**os.environ, **cell.get("env", {})}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    if args.rehearse:
        env["JAX_PLATFORMS"] = "cpu"
    asked = {**cell, "out": str(out), "card": str(pathlib.Path(args.card).resolve()), "seconds": seconds}
    command = [sys.executable, str(HERE / "accelerator_cell.py"), json.dumps(asked)]
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, said = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"stopped after {seconds:.0f} s"}
    if process.returncode:
        told = [line for line in said.splitlines() if line.strip()]
        return {"error": (told or [f"exit code {process.returncode}"])[-1][:300]}
    return json.loads(printed.splitlines()[-1])


def tables(lines: list[dict]) -> str:
    """Return Markdown tables of what was measured, one per part."""
    text = []
    for part in dict.fromkeys(line["part"] for line in lines):
        chosen = [line for line in lines if line["part"] == part]
        hidden = {"part", "cell", "env", "overrides", "wrong", "device", "versions", "error"}
        columns = list(dict.fromkeys(key for line in chosen for key in line if key not in hidden))
        head = ["what", *columns, "note"]
        text += [f"\n## {part}\n", *{line["device"] for line in chosen if "device" in line}, ""]
        text += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for line in chosen:
            switches = [f"{name}={value}" for name, value in line.get("env", {}).items()]
            what = " ".join([line["cell"], *line.get("overrides", []), *switches])
            note = line.get("error") or "; ".join(line.get("wrong", []))
            text.append(f"| {what} | {' | '.join(shown(line.get(c, '')) for c in columns)} | {note} |")
    return "\n".join(text) + "\n"


def shown(value) -> str:
    """Return a number in four digits, and anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def prepare(folder: pathlib.Path, official: str) -> None:
    """Fill a folder with wheels, the official code and the emoji; check that it is small enough."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    pip += ["--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=abi3", "--abi=none"]
    pip += [f"--platform=manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)]
    pip += ["--platform=manylinux2014_x86_64", "-d", str(wheels)]
    steps: list[tuple[str, Callable[[], object]]] = [
        (name, lambda name=name: subprocess.run([*pip, name], check=True)) for name in WHEELS
    ]
    if not (folder / "official").exists():
        clone = ["git", "clone", "-q", "--depth=1", official, str(folder / "official")]
        steps.append(("the official code", lambda: subprocess.run(clone, check=True)))
    steps.append(("the emoji", lambda: pack_emoji(folder)))
    copy = functools.partial(shutil.copytree, FASHION, folder / "fashion", dirs_exist_ok=True)
    steps.append(("Fashion-MNIST", copy))
    missing = []
    for name, step in steps:
        try:
            step()
        except (OSError, subprocess.CalledProcessError) as error:
            missing.append(f"{name}: {error}")
    shutil.rmtree(folder / "official" / ".git", ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB; install the wheels with pip install --no-index --no-deps")
    if missing or size > LARGEST:
        sys.exit("\n".join([*missing, *(["more than may travel"] if size > LARGEST else [])]))


def pack_emoji(folder: pathlib.Path) -> None:
    """Render the emoji, and pack them with their captions into emoji.npz."""
    import numpy as np  # the scheduler needs neither
    from PIL import Image

    pictures = folder / "emoji"
    shutil.rmtree(pictures, ignore_errors=True)
    subprocess.run([sys.executable, str(ROOT / "docs" / "emoji.py"), f"--out={pictures}"], check=True)
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(pictures / row["file_name"])) for row in rows])
    np.savez_compressed(folder / "emoji.npz", images=images, captions=[row["text"] for row in rows])
    shutil.rmtree(pictures)


if __name__ == "__main__":
    main()
