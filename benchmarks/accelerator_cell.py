"""One measurement of accelerator.py, in a process of its own: prints what it found as a line of JSON."""

import functools
import importlib.metadata
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pixelflow_jax.common import hardware
from pixelflow_jax.config import load_config
from pixelflow_jax.models import attention
from pixelflow_jax.training import programs

RUNS = 5  # timed, after one that compiles
SHALLOW = ["model.depth=1", "model.scan_unroll=1", "mesh.data=-1", "mesh.fsdp=1", "mesh.context=1"]
BOUNDS = {"bfloat16": 2e-2, "float32": 2e-5}  # of attention, relative to the largest entry


def parity(asked: dict) -> dict:
    """Run every recorded case of the official code in float32."""
    import parity as cases

    worst, wrong, count = 0.0, [], 0
    with jax.default_matmul_precision("highest"):
        for path in sorted(cases.cases_folder().glob("*.npz")):
            if cases.runner(path) is None:
                continue
            for what, (error, bound) in cases.run_case(path).items():
                count, worst = count + 1, max(worst, error / bound)
                if not error <= bound:
                    wrong.append(f"{path.stem} {what}: {error:.1e}, bound {bound:.0e}")
    return {"checks": count, "worst, of its bound": worst, "wrong": wrong}


def attention_errors(asked: dict) -> dict:
    """Compare every backend that can run here with float64, forward and backward."""
    platform = hardware.platform_of(jax.devices()[0])
    tiny = bool(asked.get("rehearse"))
    lengths, heads = ((64, 130), (64,)) if tiny else ((64, 256, 1024, 4096), (64, 72, 128))
    errors, wrong = {}, []
    for head_dim in heads:
        for length in lengths:
            for keys in (length, 77, 16):  # an image's own tokens, or a text's
                for name in ("bfloat16", "float32"):
                    q, k, v, mask = inputs_of(length, keys, head_dim, name, masked=keys != length)
                    truth = by_float64(q, k, v, mask)
                    for backend in attention.BACKENDS:
                        if not attention.can_run(backend, platform, q, mask):
                            continue
                        found = outputs(q, k, v, mask, backend)
                        error = max(map(relative, found, truth))
                        what = f"{backend} {name}"
                        errors[what] = max(errors.get(what, 0.0), error)
                        if not error <= BOUNDS[name]:
                            wrong.append(f"{what}, {length} x {keys} of {head_dim}: {error:.1e}")
    return {**errors, "wrong": wrong}


def inputs_of(length: int, keys: int, head_dim: int, dtype: str, masked: bool):
    """Return queries, keys, values and the mask of keys, of two sequences and two heads."""
    sizes = (length, keys, keys)
    seeds = jax.random.split(jax.random.key(0), 3)
    qkv = [
        jax.random.normal(seed, (2, n, 2, head_dim), jnp.dtype(dtype))
        for seed, n in zip(seeds, sizes, strict=True)
    ]
    lengths = jnp.array([keys, keys // 2])
    return *qkv, (jnp.arange(keys) < lengths[:, None] if masked else None)


@functools.partial(jax.jit, static_argnames="backend")
def outputs(q, k, v, mask, backend):
    """Return attention and its gradients."""

    def loss(q, k, v):
        out = attention.attention(q, k, v, mask, backend)
        return (out.astype(jnp.promote_types(out.dtype, jnp.float32)) ** 2).sum(), out

    with jax.default_matmul_precision("highest"):
        grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def by_float64(q, k, v, mask):
    """Return `outputs` in float64, on the CPU, of the same rounded inputs."""
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        wide = [jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in (q, k, v)]
        mask = None if mask is None else jnp.asarray(np.asarray(mask))
        return [np.asarray(x) for x in outputs(*wide, mask, "einsum")]


def relative(found, truth) -> float:
    """Return the largest error, relative to the largest entry."""
    found = np.asarray(found.astype(jnp.float32), np.float64)
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def configs(asked: dict) -> dict:
    """Run one train step and one sample of every config, at its own dtype and depth 1."""
    folder = pathlib.Path(__file__).parent.parent / "configs"
    names = asked.get("configs") or sorted(path.stem for path in folder.glob("[!_]*.py"))
    wrong = []
    for name in names:
        for task, make in programs.PROGRAMS.items():
            try:
                config = load_config(name)
                kinds = 2 if config.distill.teacher else 1
                batch = config.cascade.num_stages * config.accumulation_steps * kinds
                one = [*SHALLOW, "sample.num_steps=1", "sample.step_control=fixed"]
                config = load_config(name, [*one, f"batch_size={batch}", *asked.get("smaller", [])])
                program = make(config, jax.devices()[:1])
                out = program.function(*filled(program, config))
                if not all(bool(jnp.isfinite(x).all()) for x in floats(out)):
                    wrong.append(f"{name}, {task}: not finite")
            except Exception as error:  # the next one still runs
                wrong.append(f"{name}, {task}: {str(error).splitlines()[0][:200]}")
    return {"configs": len(names), "wrong": wrong}


def floats(tree) -> list:
    """Return the leaves of a tree that are floating-point numbers."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def filled(program, config) -> list:
    """Return arguments for a program: small random parameters, zeros in the optimizer, any pixels."""
    rng = np.random.default_rng(0)
    most = max(config.model.num_classes, 1)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(x.dtype, jnp.floating) and "opt_state" not in name:
            key = jax.random.key(abs(hash(name)) % 2**31)
            return jax.jit(lambda: 0.02 * jax.random.normal(key, x.shape, x.dtype))()
        if x.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 255, x.shape, np.uint8))
        if x.dtype == jnp.bool_:
            return jnp.ones(x.shape, bool)
        if "index" in name or "labels" in name:
            return jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) % most
        return jnp.zeros(x.shape, x.dtype)

    return [jax.tree_util.tree_map_with_path(leaf, argument) for argument in program.arguments]


def rates(program, config, images: int) -> dict:
    """Run a program repeatedly; return its speed, MFU and memory."""
    arguments, device, seconds = filled(program, config), jax.devices()[0], []
    for _ in range(RUNS + 1):
        begin = time.perf_counter()
        out = jax.block_until_ready(program.function(*arguments))
        seconds.append(time.perf_counter() - begin)
        if program.task == "train":
            arguments[0] = out[0]
    median = statistics.median(seconds[1:])
    found = {"images/s": images / median, "ms": 1e3 * median, "first call, s": seconds[0]}
    found["TFLOP/s"] = program.flops / median / 1e12
    if peak := hardware.PEAK_FLOPS.get(device.device_kind):
        found["MFU"] = program.flops / median / peak
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return found | ({"GiB": memory / hardware.GIB} if memory else {})


def timed(task: str, asked: dict) -> dict:
    """Time the train step or the sampler of a config."""
    config = load_config(asked["config"], ["mesh.data=-1", "mesh.fsdp=1", *asked["overrides"]])
    config.batch_size = asked["images"]  # any number, in the sampler
    program = programs.PROGRAMS[task](config, jax.devices()[:1])
    return {"config": asked["config"], **rates(program, config, config.batch_size)}


def official(asked: dict) -> dict:
    """Time the official code and ours in turn, at XL's shape in bfloat16."""
    import official as pair

    checkout = pathlib.Path(asked["card"], "official")
    if not checkout.exists():
        return {"note": f"not run: {checkout} is not there (see --prepare)"}
    shape = dict(num_heads=16, head_dim=72, depth=28, batch_size=asked["batch"], resolution=256)
    shape |= dict(num_samples=asked["batch"], num_steps=10)
    if asked.get("rehearse"):
        shape = dict(num_heads=2, head_dim=64, depth=2, batch_size=8, num_samples=2, num_steps=2)
    pair.SHAPE.update(shape)
    on_card = jax.devices()[0].platform == "gpu"
    dtype, device = ("bfloat16", "cuda") if on_card else ("float32", "cpu")
    theirs = pair.Official(sys.executable, str(checkout), os.cpu_count(), device)
    config = pair.our_config([f"dtype={dtype}"])
    ours = {"train": pair.our_train, "sample": pair.our_sampler}[asked["task"]](config)
    images = shape["batch_size" if asked["task"] == "train" else "num_samples"]
    return pair.compare(asked["task"], theirs, ours, images, RUNS)


def pictures(asked: dict) -> dict:
    """Train a config until the time is over; keep a grid and the first average in bfloat16."""
    import safetensors.numpy
    from flax.traverse_util import flatten_dict

    from pixelflow_jax.training.checkpoints import load_params

    name, out = asked["config"], pathlib.Path(asked["out"])
    workdir, card = out / "runs" / name, pathlib.Path(asked["card"])
    held = card / {"emoji": "emoji.npz", "fashion_p2": "fashion"}[name]
    if not held.exists():
        return {"note": f"not run: {held} is not there (see --prepare)"}
    if name == "emoji":
        held = unpack(held, out / "runs" / "emoji_pictures")
    flags = [f"--config.data.path={held}"]
    if asked.get("rehearse"):
        flags += [f"--config.{x}" for x in (*asked["overrides"], "num_train_steps=4", "log_every=2")]
    module = [sys.executable, "-m", "pixelflow_jax."]
    command = [*module[:2], "pixelflow_jax.train", f"--config={name}", f"--workdir={workdir}", *flags]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        process.wait(asked["share"] * (asked["seconds"] - 45))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # saves and ends with 75
    if process.wait() not in (0, 75):
        raise SystemExit(f"training {name} ended with code {process.returncode}")
    prompts = pathlib.Path(__file__).parent.parent / "docs" / "emoji.txt"
    more = [f"--prompts_file={prompts}"] if name == "emoji" else ["--num_images=100"]
    steps = ["--num_steps=1"] if asked.get("rehearse") else []
    samples = out / "runs" / f"{name}_samples"
    sampled = [*module[:2], "pixelflow_jax.sample", f"--checkpoint={workdir}", f"--out={samples}"]
    subprocess.run([*sampled, *more, *steps], check=True, stdout=sys.stderr)
    (samples / "grid.png").replace(out / f"{name}.png")
    params, _, meta = load_params(workdir)
    flat = {"/".join(k): np.asarray(x).astype(jnp.bfloat16) for k, x in flatten_dict(params).items()}
    safetensors.numpy.save_file(flat, out / f"{name}.safetensors")
    return {"config": name, "step": meta["step"]}


def unpack(file: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Write the pictures of emoji.npz as a caption_folder, if that is not there; return the folder."""
    from PIL import Image

    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    with np.load(file) as held:
        rows = []
        for number, (image, text) in enumerate(zip(held["images"], held["captions"], strict=True)):
            rows.append({"file_name": f"{number}.png", "text": str(text)})
            Image.fromarray(image).save(folder / f"{number}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


CELLS = {
    "parity": parity,
    "attention": attention_errors,
    "configs": configs,
    "train": functools.partial(timed, "train"),
    "sample": functools.partial(timed, "sample"),
    "official": official,
    "pictures": pictures,
}


def main() -> None:
    """Run the measurement that the command line describes."""
    asked = json.loads(sys.argv[1])
    found = CELLS[asked["cell"]](asked)
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    print(json.dumps({**found, "device": device.device_kind, "versions": versions}))


if __name__ == "__main__":
    main()
