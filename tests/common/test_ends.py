"""How processes end: with which code, whatever waits in them; and with which streams they run."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from pixelflow_jax.data import loader

from conftest import TINY

ROOT = pathlib.Path(__file__).parents[2]
# Each case in a fork, as JAX takes seconds to import: its exit code, or "hangs"
FORKS = """
import hashlib, os, signal, sys, threading, time
from pixelflow_jax.common import cli
from pixelflow_jax.distributed import hosts
from pixelflow_jax.common import Lost, UserError
from pixelflow_jax.distributed.preemption import Preempted, PreemptionWatch

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it

def stuck():
    threading.Thread(target=threading.Event().wait).start()  # as Orbax's after a save that failed

def fails(error):
    def main():
        stuck()
        raise error
    return main

def computes():  # in C, where Python's handlers do not run, as XLA compiles
    stuck()
    os.write(ready, b"!")
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)

def trains():
    with PreemptionWatch():
        computes()

def code_of(main, *signals):
    global ready
    seen, ready = os.pipe()
    child = os.fork()
    if not child:
        cli.run(main)
        os._exit(99)
    if signals:
        os.read(seen, 1)
        for number in signals:
            time.sleep(0.1)
            os.kill(child, number)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return "hangs"

errors = [UserError("x"), Lost("x"), OSError("x"), KeyError("x"), KeyboardInterrupt()]
errors += [SystemExit(75), SystemExit("x")]
print([code_of(fails(error)) for error in errors])
print([code_of(computes, signal.SIGINT), code_of(computes, signal.SIGINT, signal.SIGINT)])
print([code_of(trains, signal.SIGTERM), code_of(computes, signal.SIGTERM)])
"""


def python(*arguments, **kwargs):
    command = [sys.executable, *map(str, arguments)]
    kwargs = {"capture_output": True, "text": True, "timeout": 300, "cwd": ROOT} | kwargs
    return subprocess.run(command, **kwargs)


def test_processes_end_at_once():
    """Catches an error that is printed and a process that stays, and Ctrl-C that waits for XLA."""
    done = python("-c", FORKS)
    errors, interrupts, terms = map(eval, done.stdout.splitlines()[-3:])
    assert errors == [2, 76, 1, 1, 130, 75, 1], done
    assert interrupts == [130, 130], done
    assert terms == [75, -15], done  # without training there is nothing to go on with


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full"])
def test_streams_that_are_closed_or_full(tmp_path, trained, streams):
    """Catches a traceback, or numbers written into a file that took the place of a stream."""
    words = f"-m pixelflow_jax.sample --checkpoint={trained} --out={tmp_path / 'out'} --num_images=2"
    done = python("-c", "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[1]])",
                  f"{sys.executable} {words} --num_steps=1 {streams}")  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (1 if streams == ">/dev/full" else 0), done
    assert (tmp_path / "out" / "samples.npz").exists()


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_streams_of_few_letters(tmp_path, env):
    """Catches a sentence with a folder's name in its owner's letters that ends in a traceback."""
    missing = f"--checkpoint={tmp_path / 'прогон'}"
    env = os.environ | {"PYTHONCOERCECLOCALE": "0"} | env
    done = python("-m", "pixelflow_jax.sample", missing, f"--out={tmp_path / 'o'}", env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


NO_GUARD = """
import sys, pixelflow_jax as pf
config = pf.load_config("digits", {tiny} + ["data.num_workers=2"])
{call}
"""


@pytest.mark.parametrize(
    "call",
    [
        "pf.fit(config, sys.argv[1])",
        pytest.param("next(pf.prepare(config)[2])", marks=pytest.mark.slow),
    ],
)
def test_a_script_without_a_main_guard(tmp_path, call):
    """Catches worker processes that train in their turn, and a parent that waits for them for ever."""
    script = tmp_path / "script.py"
    script.write_text(NO_GUARD.format(tiny=list(TINY), call=call))
    done = python(script, tmp_path / "run")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("RuntimeError"), done.stderr
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm"),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -7. Search"),
            "/dev/shm",
        ),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -9."), "SIGKILL"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code 3."), "code 3"),
    ],
)
def test_workers_that_end_are_explained(error, said):
    """Catches a loader's death that is reported as no space on a disk that has some, or not at all."""

    def batches():
        yield {"image": 1}
        raise error

    found = loader._from_workers(batches())
    assert next(found) == {"image": 1}
    with pytest.raises(OSError, match=f"num_workers.*{said}"):
        next(found)


@pytest.mark.slow
def test_a_checkpoint_that_fails_does_not_hold_up_python(tmp_path):
    """Catches a program that calls `fit` and stays for minutes after its traceback."""
    code = (
        "import sys, pixelflow_jax as pf; from pixelflow_jax.training import checkpoints as c\n"
        "def fails(self, *_, **__):\n    raise PermissionError(13, 'Permission denied', 'x')\n"
        "from orbax.checkpoint._src.path import atomicity\n"
        "atomicity.AtomicRenameTemporaryPath.create = fails\n"
        f"pf.fit(pf.load_config('digits', {list(TINY)}), sys.argv[1])"
    )
    done = python("-c", code, tmp_path / "run")
    assert done.returncode == 1 and "CheckpointFailed" in done.stderr.splitlines()[-1], done.stderr
