"""What accelerator chips can do: published peaks, for choosing kernels and for projections."""

import dataclasses
from typing import Any

import jax

from pixelflow_jax.common.errors import UserError, sentence

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's published numbers (cloud.google.com/tpu/docs, the page of each generation).

    Attributes:
      flops: bfloat16 matrix operations a second, at peak.
      hbm_bytes, hbm_bandwidth: memory, and bytes a second from it.
      ici_bandwidth: bytes a second to the other chips of the slice, over all links, each way.
      dcn_bandwidth: bytes a second to other slices; a host's network, shared by its chips.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 6.25e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, 12.5e9),
}
# How JAX calls them
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
# bfloat16 operations a second by JAX's name for a device (NVIDIA: data sheets)
PEAK_FLOPS = {kind: CHIPS[name].flops for kind, name in DEVICE_KINDS.items()} | {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}


def platform_of(device: Any) -> str:
    """What attention chooses its kernel by: "cpu", "tpu" with the generation, as "tpu v5e", or a GPU.

    That is "gpu" if cuDNN's fused attention runs there: NVIDIA's, from Ampere on; else "other gpu".
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
    """This process's devices. Raises UserError if JAX has none of the kind that it is told to use."""
    try:
        return jax.local_devices()
    except Exception as error:  # a bare AssertionError, for JAX_PLATFORMS=cuda without the plugin
        told = jax.config.jax_platforms
        what = f"JAX_PLATFORMS={told}: JAX finds no such device" if told else "JAX finds no device"
        why = f" ({sentence(error)})" if str(error) else ""
        how = "leave JAX_PLATFORMS unset, or install the extra that drives it (tpu, cuda)"
        raise UserError(f"{what} here{why}; {how}") from None
