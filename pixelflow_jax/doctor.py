"""Check whether a training run can work here, before it costs anything. Changes nothing.

    python -m pixelflow_jax.doctor --config=configs/imagenet256_xl.py --workdir=gs://bucket/run

Prints one line per check, with what to do about a problem. With several hosts, run it on all of them
(launch/tpu_vm.sh doctor): they compare notes. Exit code 0 if a run can start, 1 if not.
"""

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from packaging.requirements import Requirement

from pixelflow_jax.aot.compiler import advice, compile_program, memory_per_device
from pixelflow_jax.common import UserError, cli, files, hardware, locks
from pixelflow_jax.common.hardware import GIB
from pixelflow_jax.config import check_batch_size, parse_flags
from pixelflow_jax.data.buckets import Shuffled, bucket_sizes
from pixelflow_jax.data.loader import look_at_captions, make_batches, why_broken
from pixelflow_jax.data.sources import load_source
from pixelflow_jax.distributed import hosts, sharding
from pixelflow_jax.distributed.rollcall import Cluster, code_digest
from pixelflow_jax.sampling.generate import build_sampler
from pixelflow_jax.training import checkpoints
from pixelflow_jax.training.programs import train_program
from pixelflow_jax.training.start import (
    check_init_from,
    check_same_data,
    data_of,
    fill_in_words,
    holds_run,
)
from pixelflow_jax.training.teacher import read_teacher

BATCHES = 5  # read to measure the speed of the data
FOLDERS = (checkpoints.FOLDER, "samples", "tensorboard", "profile", "damaged")  # of a workdir
FILES = ("config.json", "metrics.jsonl", "image_sizes.npy")
CLOCK_SECONDS = 5.0  # largest difference of clocks


class Problem(Exception):
    """A check that failed: what is wrong, and what to do."""


class Note(Exception):
    """A check that found something worth knowing; a run can start."""


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--config", default="configs/digits.py", help="config file (%(default)s)")
    parser.add_argument("--workdir", required=True, help="folder that the run would use")
    parser.add_argument("--no_compile", action="store_true", help="skip the memory estimate (minutes)")
    args, config = parse_flags(parser, argv)
    with no_new_folders(args.workdir):  # before the roll call: hosts make folders after it
        cluster = hosts.gather(
            config.hosts.start_timeout, config=config.to_dict(), workdir=args.workdir, command="doctor"
        )
        if cluster:
            hosts.connect_jax(cluster, config.hosts.start_timeout, config.hosts.heartbeat_timeout)
        verdicts = examine(args, config, cluster)
    for index, verdict in enumerate(verdicts):
        failed = [name for name, passed in verdict.items() if not passed]
        if failed:
            where = f" on {cluster.name(index)}" if cluster else ""
            print(f"{len(failed)} of {len(verdict)} checks failed{where}: {', '.join(failed)}")
    if not all(all(verdict.values()) for verdict in verdicts):
        sys.exit(1)
    print("all is well: a run can start")


def examine(args, config, cluster: Cluster | None) -> list[dict[str, bool]]:
    """Run and print the checks; return which passed on each process, so that all exit alike."""
    state_bytes = {}
    checks: dict[str, Callable[[], str]] = {
        "versions": check_versions,
        "devices": check_devices,
        "hosts": lambda: check_hosts(cluster),
        "batch": lambda: check_batch(config),
        "data": lambda: check_data(config, args.workdir),
        "memory": lambda: check_memory(config, args.no_compile, state_bytes),
        "workdir": lambda: check_workdir(args.workdir, config, state_bytes),
        "bucket": lambda: check_buckets(args.workdir, config),
        "clock": lambda: check_clock(args.workdir, cluster),
    }
    verdicts = [[look(name, check) for name, check in checks.items()]]
    if cluster:
        verdicts = multihost_utils.process_allgather(np.array(verdicts[0])).tolist()
    return [dict(zip(checks, passed, strict=True)) for passed in verdicts]


def look(name: str, check: Callable[[], str]) -> bool:
    """Run a check and print its line; return whether it allows a run to start."""
    try:
        mark, said = "ok", check()
    except Note as note:
        mark, said = "note", str(note)
    except (Problem, UserError, OSError) as error:
        mark, said = "FAIL", str(error)
    except Exception as error:  # mostly from a storage library; one failure must not hide other checks
        mark, said = "FAIL", cli.usual_cause(error) or f"{type(error).__name__}: {error}"
    print(f"{mark:<5} {name:<9} {said}", flush=True)
    return mark != "FAIL"


def check_versions() -> str:
    """Compare the installed packages with this package's requirements."""
    found = []
    for text in dependencies():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            raise Problem(f"{needed.name} is not installed: pip install '{text}'") from None
        if not needed.specifier.contains(version, prereleases=True):
            raise Problem(f"{needed.name} {version} is not {needed.specifier}: pip install '{text}'")
        if needed.name in ("jax", "flax", "orbax-checkpoint", "grain"):
            found.append(f"{needed.name} {version}")
    return f"python {sys.version.split()[0]}, {', '.join(found)}, code {code_digest()}"


def dependencies() -> list[str]:
    """Return the requirements of the installed package or, in a bare checkout, of pyproject.toml."""
    try:
        return importlib.metadata.requires("pixelflow_jax") or []
    except importlib.metadata.PackageNotFoundError:
        project = pathlib.Path(__file__).parent.parent / "pyproject.toml"
        return tomllib.loads(project.read_text())["project"]["dependencies"] if project.exists() else []


def check_devices() -> str:
    """Check that JAX sees the accelerators of this machine."""
    local, devices = hardware.local_devices(), jax.devices()
    said = f"{len(devices)} x {devices[0].device_kind}, {len(local)} of them here"
    if devices[0].platform == "cpu":
        if hosts.has_tpu_chips():
            raise Problem(f"{said}, but there are TPU chips: pip install 'pixelflow_jax[tpu]'")
        if shutil.which("nvidia-smi"):
            raise Problem(f"{said}, but there is a GPU: pip install 'pixelflow_jax[cuda]'")
        raise Note(f"{said}: no accelerator, fit for small configs only")
    return said


def check_hosts(cluster: Cluster | None) -> str:
    """Return the table of the roll call, which has succeeded by now."""
    if cluster is None:
        return "one process"
    table = hosts.host_table(cluster).replace("\n", "\n" + " " * 16)
    return f"{cluster.place.count} agree on code, packages, config and workdir\n{' ' * 16}{table}"


def check_batch(config) -> str:
    """Check that the batch splits over the mesh, and that samples can be drawn."""
    build_sampler(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, context=config.mesh.context)
    shards = sharding.batch_shards(mesh)
    check_batch_size(config, shards)
    return f"{config.batch_size} over mesh {dict(mesh.shape)}, {config.batch_size // shards} per device"


def check_data(config, workdir: str) -> str:
    """Compare the data with those of the run to resume, and read the first batches."""
    begin = time.perf_counter()
    try:
        source = load_source(config)
        fill_in_words(config, source, workdir)
        check_same_data(epath.Path(workdir), data_of(source, read_teacher(config)))
        squares = Shuffled(len(source), bucket_sizes(config.data)[:1], config.seed)  # no scan of sizes
        batches = make_batches(source, config, order=squares)
        bad = [i for i in next(batches)["broken"] if i >= 0]
        if config.model.context_dim and not config.text.cache:
            look_at_captions(source, config)
    except Exception as error:
        if not files.is_remote(config.data.path):
            raise
        raise Problem(
            f"{config.data.path}: {error}. If the bucket can be reached (see below), mount it with "
            f"gcsfuse and pass the local folder as --config.data.path"
        ) from None
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(BATCHES):
        bad += [i for i in next(batches)["broken"] if i >= 0]
    rate = BATCHES * config.batch_size / (time.perf_counter() - begin)
    said = f"{len(source):,} examples; first batch after {first:.1f} s, then {rate:,.0f} images/s"
    if bad:
        seen = (BATCHES + 1) * config.batch_size
        why = why_broken(source, int(bad[0]), config.data)
        words = f"{said}; {len(bad)} of {seen} images are broken, as {why}. Repair or remove them"
        raise Problem(words) if len(bad) > config.data.max_broken_share * seen else Note(words)
    return f"{said} (compare with images_per_s of the run)"


def check_memory(config, skip: bool, state_bytes: dict) -> str:
    """Compile the step for the devices here, and compare its memory with theirs."""
    if skip:
        raise Note("not estimated (--no_compile)")
    program = train_program(config, jax.devices())
    _, compiled, (_, seconds) = compile_program(config, program)
    state = jax.tree.leaves(program.arguments[0])
    state_bytes["all"] = sum(x.size * x.dtype.itemsize for x in state)
    needed = memory_per_device(compiled)["peak"]
    have = device_memory()
    said = (
        f"a step needs {needed / GIB:.2f} GiB per device, of {have / GIB:.1f} GiB; compiled in "
        f"{seconds:.0f} s"
    )
    if needed > have:
        raise Problem(f"{said}. {advice(config, 'train')}")
    return said


def device_memory() -> int:
    """Return the memory of a device in bytes; CPU devices share the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())


@contextlib.contextmanager
def no_new_folders(workdir: str) -> Iterator[None]:
    """Remove, at the end, the folders on the way to `workdir` that did not exist."""
    path = pathlib.Path(workdir)
    local = not files.is_remote(workdir)  # buckets have no folders
    missing = [p for p in (path, *path.parents) if local and not os.path.exists(p)]
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # another host was quicker, or it is not empty
                folder.rmdir()


@contextlib.contextmanager
def trial_file(workdir: epath.Path) -> Iterator[epath.Path]:
    """Yield a file that was written and renamed like a checkpoint; remove it at the end."""
    name = f".doctor.{uuid.uuid4().hex[:8]}"  # files.list_files leaves out such names
    first, last = workdir / f"{name}.1.tmp", workdir / f"{name}.2.tmp"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        first.write_bytes(b"doctor")
        first.rename(last)
        yield last
    finally:
        for path in (first, last):
            path.unlink(missing_ok=True)


def check_workdir(workdir: str, config, state_bytes: dict) -> str:
    """Check that `train` would accept the workdir and can write all it writes; compare free space."""
    path, free, local = epath.Path(workdir), None, not files.is_remote(workdir)
    resumes = holds_run(path, config)
    check_init_from(config, workdir)
    if who := locks.holder(path):
        raise Problem(f"{workdir} is in use by {who}: wait until it ends, or stop it")
    there = set(files.list_files(path))
    for place in [path, *(path / name for name in FOLDERS if name in there)]:
        try:
            with trial_file(place) as trial:
                if trial.read_bytes() != b"doctor":
                    raise Problem(f"{place}: a file reads differently than it was written")
                free = shutil.disk_usage(workdir).free if local else None
            for name in FILES if local and place == path else ():
                if name in there:
                    (path / name).open("ab").close()
        except (OSError, ImportError) as error:
            raise Problem(
                f"{place} cannot be written: {error}. Choose another --workdir, or fix its permissions"
            ) from None
    said = f"{workdir} allows writes, renames and reads{'; it holds this run' if resumes else ''}"
    if free is not None and state_bytes:
        need = state_bytes["all"] * (config.keep_checkpoints + 1)
        said += f"; {free / GIB:.1f} GiB free, checkpoints take {need / GIB:.2f} GiB"
        if need > free:
            raise Problem(f"{said}. Free some space, or lower --config.keep_checkpoints")
    return said


def check_buckets(workdir: str, config) -> str:
    """Check that buckets can be reached and lie in this machine's region."""
    named = {"--workdir": workdir, "data.path": config.data.path, "init_from": config.init_from}
    named["distill.teacher"] = config.distill.teacher
    named = {flag: path for flag, path in named.items() if files.is_remote(path)}
    if not named:
        return "no gs:// path is used"
    said, zone = [], this_zone()
    for flag, path in named.items():
        try:
            epath.Path(path).exists()
        except Exception as error:  # from google-auth, gcsfs, aiohttp ...
            raise Problem(
                f"{flag}={path}: {type(error).__name__}: {str(error).splitlines()[0]}. Install "
                f"'pixelflow_jax[gcs]', log in (gcloud auth application-default login), check the name"
            ) from None
        place = bucket_region(path)
        said.append(f"{flag} in {place or 'an unknown region (no gcloud here)'}")
        if zone and place and not is_near(place, zone):
            raise Problem(f"{flag}={path} is in {place}, this machine in {zone}: use a bucket there")
    return ", ".join(said) + (f"; this machine in {zone}" if zone else "")


def is_near(place: str, zone: str) -> bool:
    """Return whether a bucket's location contains the region of `zone`."""
    region = zone.rpartition("-")[0]
    continent = region.partition("-")[0]
    dual = {"us": "nam", "northamerica": "nam", "europe": "eur"}.get(continent, continent)
    around = {region, continent.replace("europe", "eu")}
    return place in around or re.fullmatch(rf"{dual}\d+", place) is not None  # nam4: two regions


def this_zone() -> str | None:
    """Return the Google Cloud zone of this machine, or None elsewhere."""
    try:
        return hosts.instance_metadata("zone", timeout=2).rpartition("/")[2]
    except OSError:
        return None


def bucket_region(path: str) -> str | None:
    """Return the location of a gs:// path's bucket in lower case, or None if gcloud cannot tell."""
    bucket = "/".join(path.split("/")[:3])
    command = ["gcloud", "storage", "buckets", "describe", bucket, "--format=value(location)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().lower() or None


def check_clock(workdir: str, cluster: Cluster | None) -> str:
    """Compare this clock with the workdir's server and, on process 0, with the other hosts."""
    with trial_file(epath.Path(workdir)) as trial:
        off = time.time() - trial.stat().mtime
    offsets = {"the workdir's server": off}
    if cluster:
        offsets |= {cluster.name(index): seconds for index, seconds in cluster.offsets.items()}
    for who, seconds in offsets.items():
        if abs(seconds) > CLOCK_SECONDS:
            raise Problem(
                f"{seconds:+.1f} s from that of {who}: switch on NTP (timedatectl set-ntp true)"
            )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    largest = max(abs(seconds) for seconds in offsets.values())
    return f"{now}, within {largest:.1f} s of {' and '.join(offsets)}"


if __name__ == "__main__":
    cli.run(main)
