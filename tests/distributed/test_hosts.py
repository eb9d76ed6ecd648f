"""Several processes: messages when one is missing or lost, and restarts."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_rollcall import close, gather, record

from pixelflow_jax.common import Lost, UserError
from pixelflow_jax.distributed import hosts, watchdog
from pixelflow_jax.distributed.rollcall import Place
from pixelflow_jax.distributed.watchdog import Watchdog

from conftest import free_port, start_hosts

ROOT = pathlib.Path(__file__).parents[2]


def test_the_place_by_hand(monkeypatch):
    """Catches a run that starts alone because one of the variables is missing."""
    for name in hosts.SIGNS:
        monkeypatch.delenv(name, raising=False)
    assert hosts.find_place() is None
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID not"):
        hosts.find_place()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert hosts.find_place() == Place("127.0.0.1:1", 2, 1)
    for name, value, said in (
        ("JAX_PROCESS_ID", "2", "below"),
        ("JAX_NUM_PROCESSES", "two", "whole number"),
        ("JAX_COORDINATOR_ADDRESS", "localhost", "HOST:PORT"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(UserError, match=said):
                hosts.find_place()


# -- the watchdog, with threads for processes


@contextlib.contextmanager
def watched(count, step_timeout=60.0, heartbeat_timeout=60.0):
    """Run watchdogs of `count` processes; return what ended them: [(exit code, message)]."""
    clusters = gather([record(f"h{i}") for i in range(count)])
    dogs = [Watchdog(cluster, step_timeout, heartbeat_timeout) for cluster in clusters]
    yield dogs
    close(clusters)


@pytest.fixture
def fast(monkeypatch):
    """Use short beats, and collect verdicts in a list instead of ending the process."""
    monkeypatch.setattr(watchdog, "BEAT", 0.05)
    monkeypatch.setattr(watchdog, "GRACE", 0.2)
    ended = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    return ended


def work(dog, seconds, every=0.05, fail=None):
    """Run steps for a while, then end with or without an error."""
    with dog:
        end, step = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            step += 1
            dog.at(f"step {step}")
            time.sleep(every)
        if fail:
            raise fail


def together(*calls):
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        jobs = [pool.submit(*call) for call in calls]
    return [job.exception() for job in jobs]


def test_a_good_end_is_quiet(fast, capfd):
    """Catches a watchdog that treats the first process to finish as lost."""
    with watched(3) as dogs:
        assert together(*[(work, dog, 0.2 + i * 0.4) for i, dog in enumerate(dogs)]) == [None] * 3
    assert fast == [] and "error" not in capfd.readouterr().err


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_gone_is_named(fast, capfd, victim):
    """Catches a pod that hangs in a collective after a crash."""
    with watched(3) as dogs:

        def die():
            time.sleep(0.3)
            for link in dogs[victim]._links.values():
                link.socket.shutdown(socket.SHUT_RDWR)

        others = [(work, dog, 1.5) for i, dog in enumerate(dogs) if i != victim]
        together((die,), *others)
    said = capfd.readouterr().err
    assert fast == [76, 76] and said.count(f"process {victim} (h{victim}) is gone") == 2, said


def test_silence_counts_as_gone(fast, capfd):
    """Catches a machine that lost its power or network without closing its connections."""
    with watched(3, heartbeat_timeout=1.5) as dogs:
        dogs[1]._tell({"at": [1, "step 1"]})
        together((work, dogs[0], 4.0), (work, dogs[2], 4.0))
    assert fast == [76, 76] and "nothing was heard of process 1 (h1) for 1.5 s" in capfd.readouterr().err


def test_a_hanging_host_is_named(fast, capfd):
    """Catches a step that never ends, and blaming the processes that wait for the late one."""
    with watched(3, step_timeout=1.2) as dogs:

        def slow(dog, steps):
            with dog:
                for step in range(steps):
                    dog.at(f"step {step}")
                time.sleep(3.0)

        together((slow, dogs[0], 9), (slow, dogs[1], 4), (slow, dogs[2], 9))
    said = capfd.readouterr().err
    assert (
        fast == [76] * 3 and "process 1 (h1) is late: at 'step 3'" in said and "wait at 'step 8'" in said
    )
    with watched(1, step_timeout=0.4) as dogs:
        together((slow, dogs[0], 2))
    assert "has been at 'step 1' for 0.4 s" in capfd.readouterr().err


def test_waiting_is_not_hanging(fast, capfd):
    """Catches a sampling run that ends because process 0 finished first, or blames a waiting one."""
    with watched(2, step_timeout=1.5) as dogs:

        def waits(dog, seconds):
            with dog:
                dog.at(watchdog.WAITING)
                time.sleep(seconds)

        assert together((waits, dogs[0], 3.5), (work, dogs[1], 3.5)) == [None] * 2
    assert fast == [] and "error" not in capfd.readouterr().err

    def stops(dog):
        with dog:
            for image in range(3):
                dog.at(f"image {image}")
            time.sleep(2.5)

    with watched(2, step_timeout=1.0) as dogs:
        together((waits, dogs[0], 2.5), (stops, dogs[1]))
    said = capfd.readouterr().err
    assert "process 1 (h1) is late: at 'image 2'" in said and "wait at 'waiting for" in said, said


def test_a_start_may_take_its_time(fast, capfd):
    """Catches a download, restore or compilation mistaken for a hang, and a missed later hang."""

    def starts(dog, hangs):
        with dog:
            for what in ("listing", "a download", "step 1"):
                dog.at(f"{watchdog.STARTING}: {what}")
                time.sleep(0.8)
            for step in range(2, 6):
                dog.at(f"step {step}")
            time.sleep(2.0 if hangs else 0.0)

    for hangs in (False, True):
        with watched(3, step_timeout=0.4) as dogs:
            assert together(*[(starts, dog, hangs) for dog in dogs]) == [None] * 3
        said = capfd.readouterr().err
        assert all(f"note: starting: {what}, for 0.4 s" in said for what in ("listing", "a download"))
        assert fast == [76] * 3 * hangs and ("'step 5'" in said) is hangs, said


def test_who_is_lost_at_the_start_is_heard_of(fast, capfd):
    """Catches a start that waits too long for a process that is gone."""
    with watched(2, step_timeout=60.0) as dogs:

        def waits(dog):
            with dog:
                dog.at(f"{watchdog.STARTING}: step 1")
                time.sleep(2.0)

        def die():
            time.sleep(0.3)
            for link in dogs[1]._links.values():
                link.socket.shutdown(socket.SHUT_RDWR)

        together((waits, dogs[0]), (die,))
    assert fast == [76] and "process 1 (h1) is gone" in capfd.readouterr().err


@pytest.mark.slow
def test_a_real_start_may_take_its_time(tmp_path, tiny_flags):
    """Catches a phase of start-up that is not marked as one."""
    places = ["load_source", "start_or_resume", "frozen_encoder"]
    code = f"""if True:
        import time
        from pixelflow_jax.common import cli
        from pixelflow_jax import train
        from pixelflow_jax.training import loop

        def slow(real):
            return lambda *args, **kwargs: (time.sleep(40), real(*args, **kwargs))[1]

        for place in {places}:
            setattr(loop, place, slow(getattr(loop, place)))
        cli.run(train.main)
    """
    flags = [*tiny_flags, f"--workdir={tmp_path / 'run'}", "--config.hosts.step_timeout=30"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    notes = done.stderr.count("note: starting: ")
    assert done.returncode == 0 and notes >= len(places), done.stderr


def test_an_error_of_one_reaches_the_others(fast, capfd):
    """Catches hosts that wait minutes for one that has stopped with its own error."""
    own = UserError("its disk is full")
    with watched(2) as dogs:
        errors = together((work, dogs[0], 3.0), (work, dogs[1], 0.3, 0.05, own))
    assert errors[1] is own and fast == [76]
    assert "process 1 (h1) stopped: UserError: its disk is full" in capfd.readouterr().err


def test_a_failing_collective_is_explained(fast):
    """Catches a network traceback that hides the reason."""
    broken = ValueError("Gloo AllGather failed")
    with watched(2) as dogs:

        def die():
            time.sleep(0.3)
            for link in dogs[1]._links.values():
                link.socket.shutdown(socket.SHUT_RDWR)

        errors = together((work, dogs[0], 0.4, 0.05, broken), (die,))
    assert isinstance(errors[0], Lost) and "process 1 (h1) is gone" in str(errors[0])


# -- real processes, through launch/local_hosts.sh


def local_hosts(count, workdir, flags, env=()):
    command = [ROOT / "launch" / "local_hosts.sh", str(count), f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "END_SECONDS": "40"} | dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def process_of(index, workdir) -> int:
    """Return the pid of a process of a run."""
    for folder in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and f"--workdir={workdir}".encode() in (
                folder / "cmdline"
            ).read_bytes().split(b"\0"):
                if f"JAX_PROCESS_ID={index}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    return int(folder.name)
    raise AssertionError(f"no process {index} of {workdir}")


def rows(workdir) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def numbers(workdir):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(workdir)]


def checkpoints(workdir) -> list[int]:
    """Return the steps of complete checkpoints (incomplete ones have other names)."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def wait_for_checkpoint(child, workdir, after):
    """Wait for a complete checkpoint later than step `after`; saving is asynchronous."""
    end = time.monotonic() + 150
    while max(checkpoints(workdir), default=0) <= after:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_it_resumes(tmp_path, tiny_flags):
    """Catches a pod that hangs after a crash of one host, or loses steps."""
    flags = [*tiny_flags, "--config.batch_size=16", "--config.checkpoint_every=5"]
    flags += ["--config.log_every=1", "--config.optimizer.schedule=constant"]
    for victim in (1, 0):
        child = local_hosts(2, tmp_path / "run", [*flags, "--config.num_train_steps=4000"])
        wait_for_checkpoint(child, tmp_path / "run", max(checkpoints(tmp_path / "run"), default=0))
        os.kill(process_of(victim, tmp_path / "run"), signal.SIGKILL)
        begin = time.monotonic()
        output = child.communicate(timeout=300)[0]
        assert child.returncode != 0 and time.monotonic() - begin < 30, output
        assert f"error: process {victim} " in output and "is gone" in output, output
        assert "Checkpoints are kept" in output
    # a busy machine decides how far the killed runs came: the comparison goes a little further
    flags.append(f"--config.num_train_steps={max(checkpoints(tmp_path / 'run')) + 10}")
    end = local_hosts(2, tmp_path / "run", flags)
    output = end.communicate(timeout=300)[0]
    assert end.returncode == 0 and "Resuming from step" in output, output
    whole = local_hosts(2, tmp_path / "whole", flags)
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_one_never_started_and_two_versions(tmp_path, tiny_flags):
    """Catches an unreported missing process, and a run with two configs, in the real command."""
    port = free_port()
    flags = [*tiny_flags, "--config.hosts.start_timeout=6"]

    def start(index, *more):
        env = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-m", "pixelflow_jax.train", f"--workdir={tmp_path / 'run'}"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([*command, *flags, *more], cwd=ROOT, env=env, **pipes)

    alone = start(0)
    output = alone.communicate(timeout=300)[0]
    assert alone.returncode == 76 and output.startswith("error: 1 of 2 hosts arrived within 6 s"), output
    pair = [start(0), start(1, "--config.model.depth=3")]
    for child in pair:
        output = child.communicate(timeout=300)[0]
        assert child.returncode == 2 and "config.model.depth: 2 on process 0" in output, output
        assert len(output.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_hosts_of_unlike_devices_are_refused(tmp_path, tiny_flags):
    """Catches a JAX traceback, or a run that ignores one host's devices."""
    command = ["pixelflow_jax.train", *tiny_flags, f"--workdir={tmp_path / 'run'}"]
    children = start_hosts(2, command, lambda index: {"JAX_NUM_CPU_DEVICES": str(2 - index)})
    for child in children:
        output = child.communicate(timeout=300)[0]
        assert child.returncode == 2 and "as many devices" in output, output
        assert re.search(r"process 0 \(.*\) 2, process 1 \(.*\) 1\n", output), output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_four_processes_train_the_default_config(tmp_path):
    """Catches failures with a real config, and with a number of processes other than two."""
    flags = ["--config=configs/digits.py", "--config.num_train_steps=10", "--config.log_every=5"]
    child = local_hosts(4, tmp_path / "run", flags)
    output = child.communicate(timeout=500)[0]
    assert child.returncode == 0 and "Trained steps 0 to 10" in output, output
    assert len(re.findall(r"\[0\] [0-3]  ", output)) == 4, output
    assert (tmp_path / "run" / "samples" / "10.png").exists() and len(rows(tmp_path / "run")) == 2


def test_threads_are_gone():
    """Catches a watchdog that outlives its run; must be the last test."""
    assert not any(thread.name == "watchdog" and thread.is_alive() for thread in threading.enumerate())
