"""Published figures of accelerator chips, to choose kernels by and to project from."""

import dataclasses
from typing import Any

import jax

from pixelflow_jax.common import UserError, sentence

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's published numbers (cloud.google.com/tpu/docs, the page of each generation).

    Attributes:
      flops: peak bfloat16 FLOP/s of the matrix units.
      hbm_bytes: size of its memory.
      ici_bandwidth: bytes/s to the other chips of its slice, over all links, each way.
      dcn_bandwidth: bytes/s to other slices: a host's network, shared by its chips.
    """

    flops: float
    hbm_bytes: float
    ici_bandwidth: float
    dcn_bandwidth: float


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 300e9, 6.25e9),
    "v5e": Chip(197e12, 16 * GIB, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95 * GIB, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32 * GIB, 448e9, 12.5e9),
}
# JAX's names for them
DEVICE_KINDS = {f"TPU {name}": name for name in CHIPS}
DEVICE_KINDS |= {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
# Peak bfloat16 FLOP/s by JAX's name for a device (NVIDIA: data sheets)
PEAK_FLOPS = {kind: CHIPS[name].flops for kind, name in DEVICE_KINDS.items()} | {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def platform_of(device: Any) -> str:
    """Return what attention chooses its kernel by: "cpu", "tpu v5e" and the like, or a kind of GPU.

    "gpu" runs cuDNN's fused attention (NVIDIA from Ampere on); all others are "other gpu".
    """
    if device.platform == "tpu":
        return f"tpu {DEVICE_KINDS.get(device.device_kind, 'unknown')}"
    if device.platform not in ("gpu", "cuda", "rocm"):
        return device.platform
    version = getattr(getattr(device, "client", None), "platform_version", "cuda")
    amd = device.platform == "rocm" or "rocm" in version.lower()
    generation = str(getattr(device, "compute_capability", "") or "8.0").partition(".")[0]
    ampere = not generation.isdigit() or int(generation) >= 8
    return "gpu" if ampere and not amd else "other gpu"


def local_devices() -> list[Any]:
    """Return this process's devices. Raises UserError if JAX has none of the requested kind."""
    try:
        return jax.local_devices()
    except Exception as error:  # a bare AssertionError, for JAX_PLATFORMS=cuda without the plugin
        told = jax.config.jax_platforms
        what = f"JAX_PLATFORMS={told}: JAX finds no such device" if told else "JAX finds no device"
        why = f" ({sentence(error)})" if str(error) else ""
        how = "leave JAX_PLATFORMS unset, or install the extra that drives it (tpu, cuda)"
        raise UserError(f"{what} here{why}; {how}") from None
