"""What JAX's own switches must not change: random numbers, dtypes, and what float32 means.

JAX reads switches from the environment (JAX_...), and takes them as context managers. What the documents
promise holds whatever they say: keys are made with an implementation of their own, programs are built
under `pinned`, and products of float32 models are float32 on every chip (`precision`).
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

# By the names of JAX's context managers; those that a version does not have are left out
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
# Those of the compiler, which have no context managers: recorded where they are not as JAX has them
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
    """Sets, in this thread, JAX's switches that change numbers, or break us, to what we rely on."""
    with contextlib.ExitStack() as stack:
        for name, value in PINNED.items():
            if hasattr(jax, name):
                stack.enter_context(getattr(jax, name)(value))
        yield


def switches() -> dict[str, Any]:
    """The switches of JAX's compiler that are not as JAX has them: they may change the last bits."""
    found = {name: jax.config.values.get(name, usual) for name, usual in RECORDED.items()}
    return {name: value for name, value in found.items() if value != RECORDED[name]}


def key(seed: int | Int[Array, ""]) -> Key[Array, ""]:
    """`jax.random.key(seed)` of Threefry, whatever JAX's default; the seed counts modulo 2^32."""
    seed = jnp.asarray(seed % 2**32 if isinstance(seed, int) else seed, jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(seed), seed]), impl="threefry2x32")


def precise(method):
    """Decorates a method of a Flax module: `precision` of its `dtype`, or float32 if it has none."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with precision(getattr(self, "dtype", jnp.float32)):
            return method(self, *args, **kwargs)

    return wrapped


def precision(dtype: Any):
    """A context in which products have the precision of a model's dtype.

    JAX's default for float32 is bfloat16 on TPU and TF32 on recent GPUs. So float32 models are traced at
    the highest, for forward passes and for backward passes that are traced in it as well.
    """
    wide = jnp.dtype(dtype).itemsize >= 4
    return jax.default_matmul_precision("highest" if wide else "default")
