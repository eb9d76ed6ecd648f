"""The processes of a run: who they are, whether all have come, and whether they agree.

JAX itself waits for missing processes and then aborts without saying which, and takes processes of
different code or config for one run. So before JAX connects them they hold a roll call over plain
TCP, at the address where JAX will meet: process 0 collects a record of each (host name, versions,
config) and answers all with the same verdict. The connections stay open for watchdog.py.
"""

import contextlib
import ctypes
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import os
import pathlib
import platform
import select
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from pixelflow_jax.errors import Lost, UserError

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
WORKER_NUMBER = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number"
)
START_SILENCE = 300.0  # seconds of silence that a process may keep before its first step
HELLO_SECONDS = 5.0  # for whoever connects to say who it is
LEAVE_SECONDS = 10.0  # for the others to end, before process 0 does
BARRIER_SECONDS = 24 * 3600  # the watchdog knows sooner if somebody is missing
SHOWN = 10  # disagreements that an error lists

_connected: "Cluster | None" = None  # as JAX's own connection, one a process

# What tells that this process is one of several, by who sets it. JAX finds out the rest.
SIGNS = {
    "JAX_COORDINATOR_ADDRESS": lambda value: bool(value),  # set by hand, or by launch/local_hosts.sh
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,  # a Cloud TPU pod, or GKE
    "MEGASCALE_COORDINATOR_ADDRESS": lambda value: bool(value),  # several TPU slices
    "SLURM_STEP_NUM_TASKS": lambda value: value.isdigit() and int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: value.isdigit() and int(value) > 1,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands in its run: process `index` of `count`, which meet at `address`."""

    address: str
    count: int
    index: int
    local_device_ids: Sequence[int] | None = None


class Link:
    """JSON lines over a connection to another process."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._received = b""

    def send(self, message: dict[str, Any]) -> None:
        """Sends one message. Raises OSError if the other side is gone."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message, or None if none came in time.

        Raises:
          ConnectionError: if the other side is gone, or does not speak as ours do.
        """
        end = time.monotonic() + timeout
        while b"\n" not in self._received:
            left = max(0.0, end - time.monotonic())
            if not select.select([self.socket], [], [], left)[0]:
                return None
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError("closed")
            self._received += data
            if not self._received.startswith(b"{"):
                raise ConnectionError("not one of ours")
        line, self._received = self._received.split(b"\n", 1)
        try:
            return json.loads(line)
        except ValueError:
            raise ConnectionError("not one of ours") from None

    def close(self) -> None:
        """Hangs up."""
        self.socket.close()


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run after the roll call; `links` are of process 0 to all, of others to it."""

    place: Place
    records: list[dict[str, Any]]
    links: dict[int, Link]
    offsets: dict[int, float]  # on process 0: seconds by which its clock is ahead of others'

    def name(self, index: int) -> str:
        """How messages call a process."""
        return f"process {index} ({self.records[index]['hostname']})"


def find_place(timeout: float = 300) -> Place | None:
    """Where this process stands, from what its launcher or machine says; None if it is alone.

    Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID to start processes by hand.

    Raises:
      UserError: if some of these are set but not all.
      Lost: if the machine's own word is not to be had, perhaps for the moment.
    """
    signs = [name for name, test in SIGNS.items() if test(os.environ.get(name, ""))]
    if not signs and not _on_tpu_vm():
        return None
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, index = _whole_number("JAX_NUM_PROCESSES"), _whole_number("JAX_PROCESS_ID")
    try:
        from jax._src import clusters  # nothing public tells the place without connecting too

        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, count, index, None, None, int(timeout)
        )
        place = Place(*found)
    except Exception as error:  # no metadata server, a variable that is not there
        if not signs and not _pod_is_near():
            return None
        found = f"{signs[0]} is set" if signs else "this is a Cloud TPU VM (else TPU_SKIP_MDS_QUERY=1)"
        raise Lost(f"{found}, but this process's place is not known: {error}") from None
    known = (place.address, place.count, place.index)
    if None in known:
        if not signs:
            return None
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        missing = [name for name, value in zip(names, known, strict=True) if value is None]
        raise UserError(f"{signs[0]} is set, but {' and '.join(missing)} not: set all three")
    if not 0 <= place.index < place.count:
        raise UserError(f"JAX_PROCESS_ID={place.index} must lie below JAX_NUM_PROCESSES={place.count}")
    if not place.address.rpartition(":")[2].isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={place.address!r} must be HOST:PORT")
    return place if place.count > 1 else None


def _whole_number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdigit():
        raise UserError(f"{name}={value!r} must be a whole number")
    return None if value is None else int(value)


def _on_tpu_vm() -> bool:
    """Whether TPU chips are plugged in here; on Google Cloud the metadata server knows the rest."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _pod_is_near() -> bool:
    """Whether a TPU VM may have others beside it: Google's metadata server does not say no."""
    if os.environ.get("TPU_SKIP_MDS_QUERY"):
        return False
    request = urllib.request.Request(WORKER_NUMBER, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code != 404
    except OSError as error:  # no such name: not on Google Cloud
        return not isinstance(getattr(error, "reason", error), socket.gaierror)


def make_record(**settings: Any) -> dict[str, Any]:
    """What a process tells of itself; all but the host name must agree. `settings`: config and so on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    record = {"versions": versions, "pixelflow_jax": code_digest(), "environment": flags, **settings}
    return {"hostname": socket.gethostname(), **json.loads(json.dumps(record))}


@functools.cache
def code_digest() -> str:
    """A short digest of this package's source, which tells one checkout from another."""
    folder, digest = pathlib.Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def gather(timeout: float, **settings: Any) -> Cluster | None:
    """The roll call of this run with `settings` (see `make_record`); None if there is one process.

    Raises UserError as `find_place` and `roll_call` do.
    """
    place = find_place(timeout)
    return roll_call(place, make_record(**settings), timeout) if place else None


def roll_call(place: Place, record: dict[str, Any], timeout: float) -> Cluster:
    """Waits for all processes and compares their records; the same verdict on every process.

    Args:
      place: of this process.
      record: see `make_record`.
      timeout: seconds to wait for the others.

    Raises:
      Lost: if some do not come in time.
      UserError: if two claim the same place, or they disagree.
    """
    if place.index:
        return _report(place, record, timeout)
    records, links, offsets = {0: record}, {}, {}
    verdict: dict[str, Any] = {"error": "process 0 was stopped", "lost": True}
    try:
        _collect(place, timeout, records, links, offsets)
        ordered = [records[i] for i in sorted(records)]
        problem, verdict = disagreements(ordered), {"records": ordered}
        if problem:
            raise UserError(problem)
    except (Lost, UserError) as error:
        verdict = {"error": str(error), "lost": isinstance(error, Lost)}
        raise
    finally:
        for link in links.values():
            with contextlib.suppress(OSError):  # the watchdog will say who
                link.send(verdict)
    return Cluster(place, ordered, links, offsets)


def _collect(place: Place, timeout: float, records: dict, links: dict, offsets: dict) -> None:
    """On process 0: adds those who come in time. Raises as `roll_call` does."""
    end = time.monotonic() + timeout
    with _listen(place.address) as listener:
        while len(records) < place.count:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                link = Link(listener.accept()[0])
            except TimeoutError:
                raise Lost(_missing(place, records, timeout)) from None
            try:
                hello = link.receive(HELLO_SECONDS) or {}
                index, count, record = int(hello["index"]), hello["count"], dict(hello["record"])
            except (OSError, KeyError, TypeError, ValueError):
                link.close()  # a port scanner, or a process that was stopped meanwhile
                continue
            if index in links and not _is_closed(links[index]):
                links[-1] = link  # so that it hears the verdict too
                raise UserError(
                    f"two processes say that they are process {index}: on {records[index]['hostname']} "
                    f"and on {record['hostname']}. Start each process once, with an index of its own"
                )
            links[index], records[index] = link, record
            offsets[index] = time.time() - float(hello["time"])
            if count != place.count:
                raise UserError(
                    f"process 0 was told of {place.count} processes, but process {index} "
                    f"({record['hostname']}) of {count}: start all with the same number"
                )


def _missing(place: Place, records: dict[int, dict], timeout: float) -> str:
    missing = [str(i) for i in range(place.count) if i not in records]
    here = ", ".join(f"{i} ({records[i]['hostname']})" for i in sorted(records))
    return (
        f"{len(records)} of {place.count} hosts arrived within {timeout:g} s: processes {here}; "
        f"missing: {', '.join(missing)}. Run the same command on all workers "
        f"(launch/tpu_vm.sh train does), and see whether the missing ones have stopped with an error"
    )


def _listen(address: str) -> socket.socket:
    port = int(address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {address}: {error.strerror}. Is a process of an earlier run "
            f"still there? (launch/tpu_vm.sh kill ends it)"
        ) from None


def _is_closed(link: Link) -> bool:
    try:
        link.receive(0)
    except OSError:
        return True
    return False


def _report(place: Place, record: dict[str, Any], timeout: float) -> Cluster:
    """On another process: tells process 0 its record, and takes its verdict."""
    host, _, port = place.address.rpartition(":")
    hello = {"index": place.index, "count": place.count, "record": record}
    end, reason = time.monotonic() + timeout, "nothing answers"
    while time.monotonic() < end:
        try:
            link = Link(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            link.socket.settimeout(None)
            link.send({**hello, "time": time.time()})
            verdict = link.receive(timeout + 2 * HELLO_SECONDS)  # process 0 may have come last
            if verdict is not None:
                break
            reason = "it answers, but did not finish the roll call"
        except OSError as error:
            reason = str(error)
            time.sleep(0.2)
    else:
        raise Lost(
            f"process {place.index}: process 0 at {place.address} was not reached within {timeout:g} s "
            f"({reason}). Run the same command on all workers, process 0 too"
        )
    if "error" in verdict:
        raise (Lost if verdict["lost"] else UserError)(verdict["error"])
    return Cluster(place, verdict["records"], {0: link}, {})


def disagreements(records: Sequence[dict[str, Any]]) -> str:
    """What keeps processes with these records from being one run, in a sentence; "" if nothing does."""
    flat = [flatten_dict(record, sep=".") for record in records]
    found = []
    for key in sorted(set().union(*flat) - {"hostname"}):
        holders: dict[str, list[str]] = {}
        for index, record in enumerate(flat):
            value = repr(record[key]) if key in record else "missing"
            holders.setdefault(value, []).append(f"process {index} ({record['hostname']})")
        if len(holders) > 1:
            parts = [
                f"{value} on {', '.join(who[:3])}" + (" ..." if who[3:] else "")
                for value, who in holders.items()
            ]
            found.append(f"{key}: {'; '.join(parts)}")
    if not found:
        return ""
    more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
    return (
        f"the hosts disagree, so nothing was started. {' | '.join(found[:SHOWN])}{more}. Bring all to "
        f"the same code, packages, environment and flags"
    )


def connect_jax(cluster: Cluster, start_timeout: float, heartbeat_timeout: float) -> None:
    """Connects JAX to the other processes; must come before other JAX calls.

    Its own heartbeat is set to notice a loss later than the watchdog, who can say more.

    JAX aborts a process with a stack trace if this fails, which the roll call makes unlikely, and as
    soon as process 0 is gone. For the watchdog to have the last word then, SIGABRT first sleeps for as
    many seconds as the signal's number says: 6.
    """
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)

    global _connected
    place = cluster.place
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        place.local_device_ids,
        initialization_timeout=int(start_timeout),
        heartbeat_timeout_seconds=int(2 * max(START_SILENCE, heartbeat_timeout)),
    )
    _connected = cluster
    if place.index:
        logging.getLogger("pixelflow_jax").setLevel(logging.ERROR)  # one voice is enough


def barrier(name: str) -> None:
    """Waits until every process of the run has come here; nothing if there is one."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        # by JAX's coordinator: a collective could run into its own timeout
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_SECONDS * 1000)


def leave(code: int) -> None:
    """Ends a process that failed at once: JAX's own way out would wait minutes for the others.

    Process 0 goes last, as JAX in the others aborts when it is gone. Returns if there are no others.
    """
    if _connected is None:
        return
    end = time.monotonic() + LEAVE_SECONDS
    for link in _connected.links.values() if _connected.place.index == 0 else ():
        while not _is_closed(link) and time.monotonic() < end:
            time.sleep(0.05)
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def host_table(cluster: Cluster) -> str:
    """The processes of a run as a table; needs JAX connected, for the devices."""
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
