"""Make results independent of JAX's configuration: random numbers, dtypes, and float32 precision.

JAX reads options from the environment (JAX_...) and from context managers. Results do not depend on
them: keys use a fixed implementation, programs are built under `pinned`, and products of float32 models
are float32 on every chip (`precision`).
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

# By the names of JAX's context managers; those that JAX does not have are skipped
PINNED: dict[str, Any] = {
    "allow_f16_reductions": True,
    "check_tracer_leaks": False,
    "debug_key_reuse": False,
    "default_prng_impl": "threefry2x32",
    "disable_jit": False,
    "enable_custom_prng": False,
    "enable_x64": False,
    "legacy_prng_key": "allow",
    "no_execution": False,
    "no_tracing": False,
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "softmax_custom_jvp": False,
    "threefry_partitionable": True,
    "transfer_guard": "allow",
}
# Compiler options, which have no context managers: recorded where they differ from JAX's defaults
RECORDED: dict[str, Any] = {
    "jax_compiler_enable_remat_pass": True,
    "jax_disable_most_optimizations": False,
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_optimization_level": "UNKNOWN",
    "jax_use_shardy_partitioner": True,
}


@contextlib.contextmanager
def pinned():
    """Set the JAX options that change results, or break this package, to fixed values in this thread."""
    with contextlib.ExitStack() as stack:
        for name, value in PINNED.items():
            if hasattr(jax, name):
                stack.enter_context(getattr(jax, name)(value))
        yield


def switches() -> dict[str, Any]:
    """Return the compiler options that differ from JAX's defaults: they may change the last bits."""
    found = {name: jax.config.values.get(name, usual) for name, usual in RECORDED.items()}
    return {name: value for name, value in found.items() if value != RECORDED[name]}


def key(seed: int | Int[Array, ""]) -> Key[Array, ""]:
    """Return `jax.random.key(seed)` for Threefry, whatever JAX's default; seeds are modulo 2^32."""
    seed = jnp.asarray(seed % 2**32 if isinstance(seed, int) else seed, jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(seed), seed]), impl="threefry2x32")


def precise(method):
    """Decorate a Flax method to run under `precision` of the module's `dtype`, or of float32."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with precision(getattr(self, "dtype", jnp.float32)):
            return method(self, *args, **kwargs)

    return wrapped


def precision(dtype: Any):
    """Return a context in which matrix products have the precision of a model's dtype.

    JAX's default for float32 is bfloat16 on TPU and TF32 on recent GPUs. Therefore float32 models are
    traced at the highest precision, in forward passes and in backward passes traced within the context.
    """
    wide = jnp.dtype(dtype).itemsize >= 4
    return jax.default_matmul_precision("highest" if wide else "default")
