"""The roll call: check that all processes of a run have arrived and agree with each other.

JAX itself waits for missing processes and then aborts without naming them, and it accepts processes with
different code or config. Therefore the processes first meet over plain TCP, at the address that JAX will
use: process 0 collects a record from each (host name, versions, config) and sends all of them the same
verdict. The connections stay open for watchdog.py.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import ipaddress
import json
import os
import pathlib
import platform
import select
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from pixelflow_jax.common import Lost, UserError, listed, log

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
HELLO_SECONDS = 5.0  # for a new connection to identify itself
MAX_HELLO = 1 << 20  # bytes per message before the sender is known; records have thousands
MAX_MESSAGE = 1 << 28  # bytes per message afterwards: all records
SEND_SECONDS = 60.0  # for a process to accept a message
STRANGERS = 64  # unidentified connections at a time; beyond that, the oldest is closed
SHOWN = 10  # disagreements that an error lists


class Place(NamedTuple):
    """The place of a process in its run: process `index` of `count`, which meet at `address`."""

    address: str
    count: int
    index: int
    local_device_ids: Sequence[int] | None = None


class Link:
    """JSON lines over a connection to another process."""

    def __init__(self, connection: socket.socket, limit: int = MAX_MESSAGE):
        self.socket, self.limit = connection, limit  # bytes per message
        self._received = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Raises OSError if the other side is gone."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the next message, or None if none arrives within `timeout` seconds.

        Raises ConnectionError if the other side is gone or does not follow the protocol.
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
            if not self._received.startswith(b"{") or len(self._received) > self.limit:
                raise ConnectionError("not one of ours")
        line, _, self._received = self._received.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise ConnectionError("not one of ours")
        return message

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def is_closed(self) -> bool:
        """Return whether the other side has closed the connection."""
        try:
            self.receive(0)
        except OSError:
            return True
        return False


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run after the roll call; process 0 has `links` to all, others only to it."""

    place: Place
    records: list[dict[str, Any]]
    links: dict[int, Link]
    offsets: dict[int, float]  # on process 0: seconds by which its clock is ahead

    def name(self, index: int) -> str:
        """Return the name of a process in messages."""
        return f"process {index} ({self.records[index]['hostname']})"


def make_record(**settings: Any) -> dict[str, Any]:
    """Return the record of this process, with `settings`; all but the host name must agree."""
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
    """Return a short digest of this package's source, which distinguishes checkouts."""
    folder, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def roll_call(place: Place, record: dict[str, Any], timeout: float) -> Cluster:
    """Wait for all processes and compare their records; every process gets the same verdict.

    Raises Lost if some processes do not arrive within `timeout` seconds, and UserError if two processes
    claim the same place or the records (see `make_record`) disagree.
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
            with contextlib.suppress(OSError):  # the watchdog will report it
                link.send(verdict)
    return Cluster(place, ordered, links, offsets)


def _collect(place: Place, timeout: float, records: dict, links: dict, offsets: dict) -> None:
    """On process 0: add the processes that arrive; a connection that sends nothing delays nobody."""
    end, waiting = time.monotonic() + timeout, {}  # socket: (link, deadline)
    with _listen(place.address) as listener, contextlib.ExitStack() as stack:
        stack.callback(lambda: [link.close() for link, _ in waiting.values()])
        while len(records) < place.count:
            left = end - time.monotonic()
            if left <= 0:
                here = ", ".join(f"{i} ({records[i]['hostname']})" for i in sorted(records))
                missing = ", ".join(str(i) for i in range(place.count) if i not in records)
                raise Lost(
                    f"{len(records)} of {place.count} hosts arrived within {timeout:g} s: processes "
                    f"{here}; missing: {missing}. Run the same command on all workers "
                    f"(launch/tpu_vm.sh train does), and check whether the missing ones stopped with an "
                    f"error"
                )
            for ready in select.select([listener, *waiting], [], [], min(left, 1.0))[0]:
                if ready is listener:
                    with contextlib.suppress(OSError):  # gone already, or no free descriptor
                        connection = listener.accept()[0]
                        connection.settimeout(SEND_SECONDS)
                        until = time.monotonic() + HELLO_SECONDS
                        waiting[connection] = Link(connection, MAX_HELLO), until
                elif ready in waiting:
                    _hear(place, waiting, ready, records, links, offsets)
            late = [x for x, (_, until) in waiting.items() if until < time.monotonic()]
            for connection in {*late, *list(waiting)[: max(0, len(waiting) - STRANGERS)]}:
                waiting.pop(connection)[0].close()


def _hear(place: Place, waiting: dict, connection: socket.socket, records, links, offsets) -> None:
    """Read from a connection; add its process when the record is complete."""
    link, _ = waiting[connection]
    try:
        hello = link.receive(0)
        if hello is None:
            return
        index, count, record = int(hello["index"]), int(hello["count"]), dict(hello["record"])
        offset, host = time.time() - float(hello["time"]), str(record["hostname"])
        if not 0 < index < max(place.count, count):
            raise ValueError(index)
        flatten_dict(record)  # raises if it is too deep to be compared
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        waiting.pop(connection)[0].close()  # a port scanner, or a process that was stopped
        return
    del waiting[connection]
    link.limit = MAX_MESSAGE
    if index in links and not links[index].is_closed():
        links[-1] = link  # so that it hears the verdict too
        raise UserError(
            f"two processes say that they are process {index}: on {records[index]['hostname']} "
            f"and on {host}. Start each process once, with its own index"
        )
    links[index], records[index], offsets[index] = link, record, offset
    if count != place.count:
        raise UserError(
            f"process 0 was told of {place.count} processes, but process {index} ({host}) of {count}: "
            f"start all with the same number"
        )


def _listen(address: str) -> socket.socket:
    """Return a socket that listens at the address of process 0 and, if possible, nowhere else.

    The name may resolve to an address that this machine does not have (a proxy's or a public one), or to
    one that others cannot reach (Debian's 127.0.1.1). Then it listens on all interfaces and warns.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        found = []
    for ip in [*found, ""]:
        both = not ip and socket.has_dualstack_ipv6()
        if not ip:
            log.warning(
                "the roll call listens on all interfaces, as %s is not an address where others reach "
                "this host",
                host,
            )
        elif host not in (ip, "localhost") and ipaddress.ip_address(ip.partition("%")[0]).is_loopback:
            continue
        family = socket.AF_INET6 if both or ":" in ip else socket.AF_INET
        try:
            return socket.create_server(
                (ip, int(port)), family=family, dualstack_ipv6=both, backlog=1024
            )
        except OSError as error:
            if ip and error.errno not in (errno.EADDRINUSE, errno.EACCES):
                continue  # not an address of this machine
            raise UserError(
                f"process 0 cannot listen at {address}: {error.strerror}. Is a process of an earlier "
                f"run still running? (launch/tpu_vm.sh kill ends it)"
            ) from None


def _report(place: Place, record: dict[str, Any], timeout: float) -> Cluster:
    """On another process: send the record to process 0 and wait for its verdict."""
    host, _, port = place.address.rpartition(":")
    hello = {"index": place.index, "count": place.count, "record": record}
    end, reason = time.monotonic() + timeout, "nothing answers"
    while time.monotonic() < end:
        try:
            link = Link(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            link.socket.settimeout(None)
            link.send({**hello, "time": time.time()})
            verdict = link.receive(timeout + 2 * HELLO_SECONDS)  # process 0 may have arrived last
            if verdict is not None:
                break
            reason = "it answered but did not finish the roll call"
        except OSError as error:
            reason = str(error)
            time.sleep(0.2)
    else:
        raise Lost(
            f"process {place.index}: process 0 at {place.address} was not reached within {timeout:g} s "
            f"({reason}). Run the same command on all workers, including process 0"
        )
    if "error" in verdict:
        raise (Lost if verdict["lost"] else UserError)(verdict["error"])
    return Cluster(place, verdict["records"], {0: link}, {})


def disagreements(records: Sequence[dict[str, Any]]) -> str:
    """Return why processes with these records cannot form one run, in a sentence; "" if they can."""
    flat = [flatten_dict(record, sep=".") for record in records]
    found = []
    for key in sorted(set().union(*flat) - {"hostname"}):
        holders: dict[str, list[str]] = {}
        for index, record in enumerate(flat):
            value = repr(record[key]) if key in record else "missing"
            holders.setdefault(value, []).append(f"process {index} ({record['hostname']})")
        if len(holders) > 1:
            parts = [f"{value} on {listed(who, 3)}" for value, who in holders.items()]
            found.append(f"{key}: {'; '.join(parts)}")
    if not found:
        return ""
    return (
        f"the hosts disagree, so nothing was started. {listed(found, SHOWN, ' | ')}. Use the same code, "
        f"packages, environment and flags on all hosts"
    )
