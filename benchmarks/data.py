"""Compare the loader's images/s with torchvision's ImageFolder in the same run.

    python benchmarks/data.py                     speeds, from JPEG files and from ArrayRecord
    python benchmarks/data.py --memory            resident memory from image 5,000 to 50,000
    python benchmarks/data.py --start             cost of start-up, from 100,000 examples

The first form needs torch and torchvision in addition to the extra `data`. Without --images, it makes
JPEG photos of ImageNet's usual size (500x375) from scikit-image's pictures. Every loader decodes,
resizes the short side to 288 (Lanczos), crops 256x256 at random and flips, with the same number of
worker processes. The loaders run in alternation, and medians are compared.
"""

import argparse
import concurrent.futures
import io
import itertools
import json
import multiprocessing
import pathlib
import pickle
import statistics
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image

from pixelflow_jax import pack
from pixelflow_jax.config import default_config
from pixelflow_jax.data.loader import make_batches
from pixelflow_jax.data.sources import load_source
from pixelflow_jax.training.start import data_of

BATCH = 64


def make_photos(folder: pathlib.Path, count: int) -> None:
    """Write 500x375 JPEG files in 10 class folders, cropped from real photos for realistic decoding."""
    from skimage import data

    photos = [Image.fromarray(photo) for photo in (data.chelsea(), data.coffee(), data.astronaut())]
    rng = np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        left, top = (int(rng.integers(size // 3)) for size in photo.size)
        box = (left, top, left + photo.width * 2 // 3, top + photo.height * 2 // 3)
        path = folder / f"{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        photo.resize((500, 375), Image.BICUBIC, box=box).save(buffer, "JPEG", quality=90)
        path.write_bytes(buffer.getvalue())


def config_for(source: str, path: str, workers: int):
    """Return a config whose batches are timed."""
    config = default_config()
    config.batch_size, config.model.num_classes = BATCH, 0
    config.data.update(source=source, path=path, num_workers=workers)
    return config


def ours(source: str, path: str, workers: int):
    """Return an endless stream of our batches."""
    config = config_for(source, path, workers)
    return make_batches(load_source(config), config)


def torchvision_folder(path: str, workers: int):
    """Return an endless stream of torchvision's batches, uint8, channels first."""
    import torch

    try:
        import torchvision
    except RuntimeError:  # its operators are built for CUDA's torch; the Python code needs two of them
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    t = torchvision.transforms
    steps = [
        t.Resize(288, t.InterpolationMode.LANCZOS),
        t.RandomCrop(256),
        t.RandomHorizontalFlip(),
        t.PILToTensor(),
    ]
    data = torchvision.datasets.ImageFolder(path, t.Compose(steps))
    loader = torch.utils.data.DataLoader(
        data, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def rate(stream, batches: int) -> float:
    """Return images/s over some batches of a running stream."""
    begin = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * BATCH / (time.perf_counter() - begin)


def speeds(folder: str, packed: str, workers: int, rounds: int, batches: int) -> None:
    """Print medians and ratios; each loader is stopped before the next starts."""
    streams = {
        "torchvision ImageFolder": lambda: torchvision_folder(folder, workers),
        "folder": lambda: ours("folder", folder, workers),
        "array_record": lambda: ours("array_record", packed, workers),
    }
    rates = {name: [] for name in streams}
    for _ in range(rounds):
        for name, make in streams.items():
            stream = make()
            rate(stream, 6)  # start the workers and fill the buffers
            rates[name].append(rate(stream, batches))
            del stream
    base = statistics.median(rates["torchvision ImageFolder"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<24} {median:7.1f} images/s, {median / base:.2f} x torchvision's", flush=True)


def resident_mib() -> float:
    """Return the resident memory of this process and its children, in MiB."""
    import psutil

    process = psutil.Process()
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True))) / 2**20


def memory(folder: str, workers: int, first: int, last: int) -> None:
    """Print resident memory at two positions of a long stream."""
    stream, seen, sizes = ours("folder", folder, workers), 0, {}
    for mark in (first, last):
        while seen < mark:
            next(stream)
            seen += BATCH
        sizes[mark] = resident_mib()
        print(f"image {seen}: {sizes[mark]:.0f} MiB", flush=True)
    print(f"growth: {sizes[last] / sizes[first] - 1:+.1%} (bar: under 5%)")


def make_sources(work: pathlib.Path, count: int) -> dict[str, list[tuple[str, pathlib.Path]]]:
    """Write `count` tiny examples of each kind; return (case, path) pairs by source."""
    caption = "a photo of something in front of something else, about as long as captions are"
    for i in range(count):
        path = work / "folder" / f"n{i % 100:08d}" / f"n{i % 100:08d}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    lines = []
    (work / "captions").mkdir()
    for i in range(count):
        (work / "captions" / f"{i:09d}.jpg").touch()
        lines.append(json.dumps({"file_name": f"{i:09d}.jpg", "text": f"{caption} {i}"}))
    (work / "captions" / "metadata.jsonl").write_text("\n".join(lines))
    (work / "tars").mkdir()
    for shard in range(-(-count // 10_000)):
        with tarfile.open(work / "tars" / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * 10_000, min((shard + 1) * 10_000, count)):
                for suffix, data in (("jpg", b"none"), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    pack.main([f"--path={work}/folder", f"--out={work}/packed"])
    (work / "idx").mkdir()
    for kind, shape in (("images", (count, 28, 28)), ("labels", (count,))):
        head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        body = np.zeros(shape, np.uint8).tobytes()
        (work / "idx" / f"train-{kind}-idx{len(shape)}-ubyte").write_bytes(head + body)
    return {
        "folder": [("folder", work / "folder")],
        "caption_folder": [("caption_folder, metadata.jsonl", work / "captions")],
        "webdataset": [("webdataset, first start", work / "tars"), ("webdataset, later", work / "tars")],
        "array_record": [("array_record", work / "packed")],
        "idx": [("idx, 28x28", work / "idx")],
    }


def cost_of(source: str, path: str) -> tuple[float, float, float]:
    """Return (seconds to open and compare, bytes of peak memory, bytes per worker) of a source."""
    config = config_for(source, path, 0)
    config.model.context_dim = 8 * (source in ("caption_folder", "webdataset"))
    config.data.resolution = 28
    data_of(load_source(default_config_of_digits()))  # imports, and JAX's initialization
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak that Linux records
    before, begin = highest_memory(), time.perf_counter()
    found = load_source(config)
    data_of(found)
    seconds = time.perf_counter() - begin
    return seconds, highest_memory() - before, float(len(pickle.dumps(found)))


def highest_memory() -> float:
    """Return the peak memory of this process in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])


def default_config_of_digits():
    """Return a config of the smallest source."""
    config = config_for("digits", "", 0)
    config.data.resolution = 16
    return config


def start(count: int) -> None:
    """Print the cost of opening each source at `count` examples, and linear extrapolations from it."""
    costs: dict[str, list[np.ndarray]] = {}
    for examples in (count // 10, count):
        with tempfile.TemporaryDirectory() as work:
            for source, cases in make_sources(pathlib.Path(work), examples).items():
                for name, path in cases:
                    spawn = multiprocessing.get_context("spawn")
                    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
                        found = pool.submit(cost_of, source, str(path)).result()
                    costs.setdefault(name, []).append(np.array(found))
    print(f"{'':<32} {'examples':>12} {'seconds':>9} {'GiB':>8} {'GiB per worker':>14}")
    for name, (few, many) in costs.items():
        for examples in (count, 10**6, 10**8):
            slope = np.maximum(many - few, 0) / (count - count // 10)
            seconds, peak, shipped = many + (examples - count) * slope
            sizes = f"{peak / 2**30:>8.2f} {shipped / 2**30:>14.2f}"
            print(f"{name:<32} {examples:>12,} {seconds:>9.1f} {sizes}", flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="a folder of class folders (default: made for this run)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=30, help="number timed per round")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--start", action="store_true", help="measure start-up instead of speed")
    parser.add_argument("--examples", type=int, default=100_000, help="number for --start")
    args = parser.parse_args()
    if args.start:
        start(args.examples)
        return
    with tempfile.TemporaryDirectory() as work:
        folder = args.images or f"{work}/images"
        if not args.images:
            make_photos(pathlib.Path(folder), 2000)
        if args.memory:
            memory(folder, args.workers, 5_000, 50_000)
        else:
            pack.main([f"--path={folder}", f"--out={work}/packed", "--shard_size=500"])
            speeds(folder, f"{work}/packed", args.workers, args.rounds, args.batches)


if __name__ == "__main__":
    main()
