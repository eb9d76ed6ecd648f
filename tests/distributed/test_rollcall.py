"""The roll call: arrivals, missing processes, disagreements, and strangers."""

import concurrent.futures
import contextlib
import os
import re
import socket
import threading
import time

import pytest

from pixelflow_jax.common import Lost, UserError
from pixelflow_jax.distributed import rollcall
from pixelflow_jax.distributed.rollcall import Place, make_record, roll_call

from conftest import free_port


def gather(records, timeout=10.0, count=None, indices=None):
    """Hold the roll call of several processes, as threads; return a Cluster or an error of each."""
    address, count = f"127.0.0.1:{free_port()}", count or len(records)
    indices = indices or range(len(records))

    def one(index, record):
        try:
            return roll_call(Place(address, count, index), record, timeout)
        except (Lost, UserError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(records)) as pool:
        return list(pool.map(one, indices, records))


def record(host, **settings):
    return make_record(**settings) | {"hostname": host}


def close(clusters):
    for cluster in clusters:
        for link in getattr(cluster, "links", {}).values():
            link.close()


def test_all_come_and_all_know_of_all():
    """Catches mixed-up records, and a start that depends on the order of arrival."""
    clusters = gather([record(f"h{i}", config={"a": 1}) for i in range(5)])
    assert all(c.records == clusters[0].records for c in clusters)
    assert [clusters[0].name(i) for i in range(5)] == [f"process {i} (h{i})" for i in range(5)]
    assert set(clusters[0].links) == {1, 2, 3, 4} and all(
        abs(s) < 1 for s in clusters[0].offsets.values()
    )
    close(clusters)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"config": {"model": {"depth": 6}, "seed": 1}},
            r"config.model.depth: 4 on process 0 \(a\), process 2 \(c\); 6 on process 1 \(b\)",
        ),
        ({"workdir": "y"}, "workdir: 'x' on process 0"),
        ({"versions": {"jax": "0.9"}}, "versions.jax"),
        ({"pixelflow_jax": "other"}, "pixelflow_jax"),
    ],
)
def test_hosts_that_disagree_are_refused_alike(changes, said):
    """Catches a pod that trains with two configs, versions or checkouts."""
    same = {"config": {"model": {"depth": 4}, "seed": 1}, "workdir": "x"}
    errors = gather([record("a", **same), record("b", **same) | changes, record("c", **same)])
    assert all(isinstance(error, UserError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "hosts disagree" in str(errors[0]) and re.search(said, str(errors[0])), errors[0]
    assert "seed" not in str(errors[0])


def test_who_is_missing_is_said_to_all():
    """Catches a pod that waits silently for a worker that was not started (jax-ml/jax#22436)."""
    begin = time.monotonic()
    errors = gather([record("a"), record("b"), record("d")], timeout=1.5, count=4, indices=[0, 1, 3])
    assert time.monotonic() - begin < 10
    for error in errors:
        assert isinstance(error, Lost)
        assert "3 of 4 hosts arrived" in str(error) and "missing: 2." in str(error), error
        assert "on all workers" in str(error)


def test_process_0_missing():
    """Catches the same if process 0 is the missing one."""
    (error,) = gather([record("b")], timeout=1, count=2, indices=[1])
    assert (
        isinstance(error, Lost)
        and "process 0 at 127.0.0.1" in str(error)
        and "on all workers" in str(error)
    )


def test_two_with_the_same_index_and_another_number():
    """Catches a launcher that numbers processes incorrectly."""
    errors = gather([record("a"), record("b"), record("c")], count=3, indices=[0, 1, 1])
    assert all("two processes say that they are process 1" in str(error) for error in errors)
    address = f"127.0.0.1:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(roll_call, Place(address, count, index), record("a"), 5)
            for index, count in ((0, 2), (1, 3))
        ]
    assert all("was told of 2 processes, but process 1" in str(job.exception()) for job in jobs)


def test_strangers_and_stale_runs():
    """Catches a run stopped by a port scanner, and a port held by an earlier run."""
    port = free_port()
    place = [Place(f"127.0.0.1:{port}", 2, index) for index in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll_call, place[0], record("a"), 10)
        time.sleep(0.3)
        for hello in (b"GET / HTTP/1.1\r\n\r\n", b'{"index": "x"}\n', b"{]\n", b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(hello)
        second = pool.submit(roll_call, place[1], record("b"), 10)
        close([first.result(), second.result()])
    with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True):
        with pytest.raises(UserError, match="an earlier run"):
            roll_call(place[0], record("a"), 1)


def strange(port, stop, kind):
    """Connect repeatedly, like a scanner or an attacker on the network."""
    deep = (
        b'{"index": 1, "count": 2, "time": 0, "record": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}\n"
    )
    says = {
        "huge": [b"{" + b"a" * 65536] * 100,
        "slow": [b"{"] * 100,
        "deep": [deep, b"[" * 100_000 + b"\n"],
        "other kinds": [b"[1]\n", b"1\n", b"null\n", b'{"index": null}\n', b'{"index": 1e999}\n', b"\n"],
        "noise": [os.urandom(1000)] * 10,
        "many": [b""] * 300,
    }[kind]
    kept = []
    while not stop.is_set():
        for part in says:
            with contextlib.suppress(OSError):
                if not kept or kind != "slow":
                    kept.append(socket.create_connection(("127.0.0.1", port), timeout=1))
                kept[-1].sendall(part)
                if kind == "huge":
                    for part in says:
                        kept[-1].sendall(part)
            if stop.wait(0.01):
                break
    for connection in kept:
        connection.close()


@pytest.mark.parametrize("kind", ["huge", "slow", "deep", "other kinds", "noise", "many"])
def test_neighbours_do_not_stop_a_roll_call(kind, monkeypatch):
    """Catches a stranger who costs process 0 memory, time or a traceback before the run."""
    port, stop = free_port(), threading.Event()
    monkeypatch.setattr(rollcall, "HELLO_SECONDS", 1.0)
    place = [Place(f"127.0.0.1:{port}", 2, index) for index in range(2)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(roll_call, place[0], record("a"), 60)
        neighbour = pool.submit(strange, port, stop, kind)
        time.sleep(0.7)
        try:
            clusters = [pool.submit(roll_call, place[1], record("b"), 60).result(), first.result()]
            close(clusters)
            assert [len(cluster.records) for cluster in clusters] == [2, 2]
        finally:
            stop.set()
        neighbour.result()


def test_the_roll_call_listens_at_its_own_address(monkeypatch, caplog):
    """Catches a port that is open to a network without processes of the run."""
    for host, own in (("127.0.0.1", True), ("localhost", True), ("127.0.0.2", True), ("h1", False)):
        found = socket.getaddrinfo if own else lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 0))]
        monkeypatch.setattr(rollcall.socket, "getaddrinfo", found)
        with rollcall._listen(f"{host}:{free_port()}") as listener:
            monkeypatch.undo()
            there = "127.0.0.1" if host == "localhost" else host if own else "127.0.0.1"
            port, other = listener.getsockname()[1], "127.0.0.3"
            with contextlib.suppress(OSError):  # localhost may be ::1
                socket.create_connection((there, port), timeout=5).close()
            reached = socket.socket().connect_ex((other, port)) == 0
            assert reached is not own, host
    assert "listens on all interfaces, as h1" in caplog.text
