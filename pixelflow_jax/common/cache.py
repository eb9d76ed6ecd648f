"""What can be made again, in a folder of the user's: compiled programs, conversions of weights."""

import contextlib
import hashlib
import os
import pathlib
import platform

import jax
import jaxlib

FLAG = "no_compile_cache"
LARGEST = 8 << 30  # bytes of compiled programs on a disk; the oldest make room
LEAST_SECONDS = 0.1  # of compiling, for a program to be kept
CPU_INFO = pathlib.Path("/proc/cpuinfo")


def cache_folder() -> pathlib.Path:
    """Return $XDG_CACHE_HOME/pixelflow_jax, by default ~/.cache/pixelflow_jax."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(home) / "pixelflow_jax"


def keep_programs() -> None:
    """Keep compiled programs in JAX's persistent cache, so that a second start need not compile.

    $JAX_COMPILATION_CACHE_DIR names another folder, or a bucket, which then has no limit. Does nothing
    if the folder cannot be made.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / "programs" / f"{jax.__version__}-{jaxlib.__version__}-{_machine()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # such as a home that is read-only
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)


def _machine() -> str:
    """Return a digest of what programs compiled for this processor may use."""
    features = {platform.machine()}
    with contextlib.suppress(OSError):
        lines = CPU_INFO.read_text(errors="replace").splitlines()
        features |= {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return hashlib.sha256("\n".join(sorted(features)).encode()).hexdigest()[:12]
