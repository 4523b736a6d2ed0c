"""What the devices can do: peak arithmetic, memory, and the dtype that suits them."""

import contextlib
import os
import re
from pathlib import Path

import jax

from slm_jax.model import DType, GPTConfig, count_params

# Dense bfloat16 (or, before it existed, float16) peak in FLOP/s by a part of the device's name that no digit follows,
# from the makers' data sheets; the first match counts.
PEAK_FLOPS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("TPU v3", 61.5e12),  # a chip of v3 or v2 is two devices
    ("TPU v2", 22.5e12),
)


def best_dtype(device: jax.Device | None = None) -> DType:
    """Return what to compute in on a device: bfloat16 on a TPU or an NVIDIA GPU that has it, else float32.

    A GPU older than compute capability 8.0, such as Colab's T4, only emulates bfloat16.
    """
    device = device or jax.devices()[0]
    if device.platform == "tpu":
        return "bfloat16"
    if device.platform in ("gpu", "cuda"):
        capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))  # AMD's: gfx942
        if capability and int(capability[1]) >= 8:
            return "bfloat16"
    return "float32"


def peak_flops(dtype: DType, device: jax.Device | None = None) -> float | None:
    """Return the peak FLOP/s of one device in a 16-bit dtype; None where it is not known."""
    device = device or jax.devices()[0]
    if dtype == "float32":
        return None
    return next((peak for name, peak in PEAK_FLOPS if re.search(rf"{name}(?!\d)", device.device_kind)), None)


def flops_per_token(cfg: GPTConfig) -> float:
    """Return the FLOPs of training on one token: 6·N + 12·layers·width·context (Chowdhery et al. 2022, appendix B).

    N leaves out the position embeddings; a tied head counts once, as the matrix product that it is.
    """
    n_params = count_params(cfg) - cfg.context_length * cfg.emb_dim
    if not cfg.tie_weights:
        n_params -= cfg.vocab_size * cfg.emb_dim  # the input embedding is a look-up, not a product
    return 6.0 * n_params + 12.0 * cfg.n_layers * cfg.emb_dim * cfg.context_length


def device_memory(device: jax.Device | None = None) -> int | None:
    """Return the bytes that one device offers; on a CPU, its share of the memory; None where it is not known."""
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        memory = _machine_memory()
        return memory and memory // jax.local_device_count()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def _machine_memory() -> int | None:
    """Return the bytes that programs can still get, caches that give way included; elsewhere than on Linux, all."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
