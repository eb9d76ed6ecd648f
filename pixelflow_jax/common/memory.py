"""Memory of a process that computes on CPU."""

import importlib.util
import os
import pathlib
import platform
import sys

TUNABLE = "glibc.malloc.hugetlb=1"
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
PLUGINS = ("libtpu", "jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin")


def restart_with_huge_pages() -> None:
    """Start this process anew, with malloc's large blocks in pages of 2 MiB, if it computes on CPU.

    XLA allocates the arrays of every step anew, and the kernel clears them page by page: at 4 KiB, that
    is a fifth of a small training step. glibc (2.35 or later) asks for larger pages if a variable of the
    environment says so when the process starts. Returns where that changes nothing: other systems, hosts
    with accelerators, kernels with another policy, and users who have set the variable.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        return
    try:
        policy = HUGE_PAGES.read_text()
    except OSError:
        return
    if "[madvise]" in policy and not any(importlib.util.find_spec(name) for name in PLUGINS):
        environ = {**os.environ, "GLIBC_TUNABLES": TUNABLE}
        os.execve(sys.executable, sys.orig_argv, environ)  # the same name for ps and pgrep
