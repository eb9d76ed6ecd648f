"""Fixtures and helpers that several tests share."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from pixelflow_jax.config import load_config
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.models.transformer import PixelFlow

# Most of the tests' time is compilation, which XLA's simplest code generation cuts to a third. Set
# PIXELFLOW_TESTS_OPTIMIZED=1 to test what users run; CI does so on its second Python.
FAST = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # XLA aborts at flags that it does not know: look again then
    FAST += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
if not os.environ.get("PIXELFLOW_TESTS_OPTIMIZED"):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST]).strip()

# Programs are compiled once per session, including those of child processes and of xdist's workers.
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR")
if CACHE is None or "PYTEST_XDIST_WORKER" not in os.environ:
    FOLDER = tempfile.TemporaryDirectory(prefix="pixelflow-tests-")
    CACHE = FOLDER.name
for name, value in (
    ("jax_compilation_cache_dir", CACHE),
    ("jax_persistent_cache_min_compile_time_secs", 0.5),
    ("jax_persistent_cache_min_entry_size_bytes", -1),
):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

TINY = (
    "model.num_heads=2",
    "model.head_dim=8",
    "model.depth=2",
    "batch_size=8",
    "num_train_steps=4",
    "log_every=2",
    "checkpoint_every=2",
    "sample_every=0",
    "sample.num_steps=2",
    "sample.num_images=10",
)


@pytest.fixture
def tiny_config():
    """The default config with a network that compiles in seconds."""
    return load_config("configs/digits.py", TINY)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A workdir of the default config with a tiny network; tests only read it."""
    from pixelflow_jax.training.loop import train

    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(load_config("configs/digits.py", TINY), workdir)
    return workdir


@pytest.fixture
def tiny_flags():
    """The overrides of `tiny_config` as command-line flags."""
    return [f"--config.{override}" for override in TINY]


@pytest.fixture
def t5_folder(tmp_path):
    """A T5 folder with random weights in two files, and a tokenizer of the captioned digits' words."""
    from tiny_t5 import write_t5

    return write_t5(tmp_path / "t5")


@pytest.fixture(scope="session")
def noisy_params():
    """A function model -> random parameters; the zeros of the init would hide everything."""

    def make(model: PixelFlow, seed: int = 0):
        rng = np.random.default_rng(seed)
        shapes = abstract_params(model)
        return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)

    return make


def with_devices(count: int) -> dict[str, str]:
    """Return the environment of a child process that sees `count` CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}".strip()}


def free_port() -> int:
    """Return a TCP port on which nothing listens."""
    with socket.create_server(("", 0)) as sock:
        return sock.getsockname()[1]


def start_hosts(count: int, command: list, env_of=lambda index: {}) -> list[subprocess.Popen]:
    """Start `python -m command` as `count` processes of one run; `env_of` adds to the environment."""
    port, children = free_port(), []
    for index in range(count):
        env = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
            **env_of(index),
        }
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        root = pathlib.Path(__file__).parent.parent
        children.append(subprocess.Popen([sys.executable, "-m", *command], cwd=root, env=env, **pipes))
    return children


def calm(model: PixelFlow) -> dict:
    """Return parameters without zeros, of a velocity field as smooth as a trained one's."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(model)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)
