"""The processes of a run: finding the place of each, and connecting them through JAX."""

import collections
import ctypes
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import signal
import socket
import urllib.error
import urllib.request
from typing import Any

import jax

from pixelflow_jax.common import Lost, UserError, ends
from pixelflow_jax.distributed.rollcall import Cluster, Place, make_record, roll_call

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"
START_SILENCE = 300.0  # seconds that a process may be silent before its first step
BARRIER_SECONDS = 24 * 3600  # the watchdog notices a missing process earlier

# Variables that show that this process is one of several. JAX detects the rest.
SIGNS = {
    "JAX_COORDINATOR_ADDRESS": lambda value: bool(value),  # set by hand, or by launch/local_hosts.sh
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,  # a Cloud TPU pod, or GKE
    "MEGASCALE_COORDINATOR_ADDRESS": lambda value: bool(value),  # several TPU slices
    "SLURM_STEP_NUM_TASKS": lambda value: value.isdigit() and int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: value.isdigit() and int(value) > 1,
}


def find_place(timeout: float = 300) -> Place | None:
    """Return the place of this process according to its launcher or machine; None if it is alone.

    Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID to start processes by hand.
    `timeout` limits the wait for the cluster's metadata, in seconds.

    Raises UserError if only some of these variables are set or a value is invalid, and Lost if the place
    is not known, perhaps temporarily.
    """
    signs = [name for name, test in SIGNS.items() if test(os.environ.get(name, ""))]
    if not signs and not _on_tpu_vm():
        return None
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, index = _whole_number("JAX_NUM_PROCESSES"), _whole_number("JAX_PROCESS_ID")
    try:
        from jax._src import clusters  # no public function returns the place without connecting

        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        place = Place(*detect(address, count, index, None, None, int(timeout)))
    except Exception as error:  # such as no metadata server, or a missing variable
        if not signs and not _pod_is_near():
            return None
        found = f"{signs[0]} is set" if signs else "this is a Cloud TPU VM (else TPU_SKIP_MDS_QUERY=1)"
        raise Lost(f"{found}, but the place of this process is not known: {error}") from None
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name, value in zip(names, place[:3], strict=True) if value is None]
    if missing:
        if not signs:
            return None
        raise UserError(f"{signs[0]} is set, but {' and '.join(missing)} not: set all three")
    if not 0 <= place.index < place.count:
        raise UserError(f"JAX_PROCESS_ID={place.index} must be below JAX_NUM_PROCESSES={place.count}")
    if not place.address.rpartition(":")[2].isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={place.address!r} must be HOST:PORT")
    return place if place.count > 1 else None


def _whole_number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdigit():
        raise UserError(f"{name}={value!r} must be a whole number")
    return None if value is None else int(value)


def has_tpu_chips() -> bool:
    """Return whether the kernel of this machine sees TPU chips."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _on_tpu_vm() -> bool:
    """Return whether JAX can use TPU chips here; on Google Cloud the metadata server knows the rest."""
    return has_tpu_chips() and importlib.util.find_spec("libtpu") is not None


def instance_metadata(name: str, timeout: float) -> str:
    """Return what Google Cloud's metadata server says of this machine. Raises OSError elsewhere."""
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read().decode()


def _pod_is_near() -> bool:
    """Return whether a TPU VM may be part of a pod: Google's metadata server does not deny it."""
    if os.environ.get("TPU_SKIP_MDS_QUERY"):
        return False
    try:
        instance_metadata("attributes/agent-worker-number", timeout=5)
        return True
    except urllib.error.HTTPError as error:
        return error.code != 404
    except OSError as error:  # an unknown name: not on Google Cloud
        return not isinstance(getattr(error, "reason", error), socket.gaierror)


def gather(timeout: float, **settings: Any) -> Cluster | None:
    """Hold the roll call of this run with `settings` (see `make_record`); None if there is one process.

    Raises UserError and Lost as `find_place` and `roll_call` do.
    """
    place = find_place(timeout)
    return roll_call(place, make_record(**settings), timeout) if place else None


def connect_jax(cluster: Cluster, start_timeout: float, heartbeat_timeout: float) -> None:
    """Connect JAX to the other processes; must precede other JAX calls.

    JAX's own heartbeat is set to notice a loss later than the watchdog, whose message says more.

    JAX aborts a process with a stack trace if connecting fails, which the roll call makes unlikely, and
    as soon as process 0 is gone. To let the watchdog report first, the handler of SIGABRT is libc's
    `sleep`, which sleeps for as many seconds as the signal's number: 6.

    Raises UserError if processes have different numbers of devices, which JAX's helpers do not support.
    """
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)

    place = cluster.place
    jax.distributed.initialize(
        *place,
        initialization_timeout=int(start_timeout),
        heartbeat_timeout_seconds=int(2 * max(START_SILENCE, heartbeat_timeout)),
    )
    if place.index == 0:  # JAX aborts in the other processes as soon as process 0 is gone
        ends.LAST += [link.is_closed for link in cluster.links.values()]
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        has = ", ".join(f"{cluster.name(index)} {count}" for index, count in sorted(counts.items()))
        raise UserError(f"every host must have as many devices as the others, but they have: {has}")
    if place.index:
        logging.getLogger("pixelflow_jax").setLevel(logging.ERROR)  # only process 0 logs


def barrier(name: str) -> None:
    """Wait until every process of the run has reached this call."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        # through JAX's coordinator: a collective could reach its own timeout
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_SECONDS * 1000)


def host_table(cluster: Cluster) -> str:
    """Return a table of the processes of a run. JAX must be connected, for the devices."""
    kinds: dict[int, list[str]] = {}
    for device in jax.devices():
        kinds.setdefault(device.process_index, []).append(device.device_kind)
    line = "{:<8} {:<24} {:<20} {:<8} {:<8} {:<13} {}".format
    lines = [line("process", "host", "devices", "python", "jax", "code", "config")]
    for index, record in enumerate(cluster.records):
        here, versions = kinds.get(index, ["none"]), record["versions"]
        config = hashlib.sha256(json.dumps(record.get("config"), sort_keys=True).encode()).hexdigest()
        devices = f"{len(here)} x {here[0]}"
        known = versions["python"], versions["jax"], record["pixelflow_jax"], config[:12]
        lines.append(line(index, record["hostname"], devices, *known))
    return "\n".join(lines)
