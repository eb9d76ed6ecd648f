"""The roll call: whether all processes of a run have come, and whether they agree.

JAX itself waits for missing processes and then aborts without saying which, and takes processes of
different code or config for one run. So before JAX connects them they meet over plain TCP, at the
address where JAX will: process 0 collects a record of each (host name, versions, config) and answers
all with the same verdict. The connections stay open for watchdog.py.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from pixelflow_jax.errors import Lost, UserError

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
HELLO_SECONDS = 5.0  # for whoever connects to say who it is
SHOWN = 10  # disagreements that an error lists


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

    def is_closed(self) -> bool:
        """Whether the other side has hung up."""
        try:
            self.receive(0)
        except OSError:
            return True
        return False


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
            if index in links and not links[index].is_closed():
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
