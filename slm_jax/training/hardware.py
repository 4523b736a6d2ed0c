"""Peak FLOP/s, memory and best dtype of devices, and the environment that the numbers of a run depend on."""

import contextlib
import dataclasses
import math
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax

from slm_jax.errors import InputError
from slm_jax.model import DType, GPTConfig, axis_sizes, param_shapes
from slm_jax.nn.axes import count
from slm_jax.nn.target import target, target_of
from slm_jax.training.config import BaseRunConfig


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of accelerator, according to its maker's data sheet; FLOP/s are for dense matrices."""

    name: str  # name on the command line
    kind: str  # part of JAX's device_kind, not followed by a digit
    platform: Literal["gpu", "tpu"]
    capability: float | None  # NVIDIA's compute capability
    peak_16bit: float  # in bfloat16, or in float16 where bfloat16 is only emulated
    peak_float32: float  # for float32 arrays as JAX multiplies them: in TF32 if available, on a TPU in bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes a second
    link: float  # bytes a second sent over all its links: to its host's GPUs, or within a TPU slice
    network: float  # bytes a second sent to other hosts (GPU) or slices (TPU): its share of its host's network

    @property
    def usable(self) -> float:
        """Share of the memory that JAX gives to a program: 75% on a GPU; on a TPU as on a v5e, 15.75 of 16 GiB."""
        return 0.75 if self.platform == "gpu" else 15.75 / 16

    def peak(self, dtype: DType) -> float:
        """Return the peak FLOP/s in a dtype."""
        return self.peak_float32 if dtype == "float32" else self.peak_16bit


# Sources: NVIDIA's data sheets (dense; SXM if there are several forms) and Google Cloud's pages on TPUs. Links and
# networks count one direction. The network is that of NVIDIA's DGX with these GPUs, else of a cloud host with 8 of
# them; those of v4, v3 and v2 are assumed. The first match counts.
DEVICES = (
    Device("h200", "H200", "gpu", 9.0, 989e12, 495e12, 141e9, 4.8e12, 450e9, 50e9),
    Device("h100-pcie", "H100 PCIe", "gpu", 9.0, 756e12, 378e12, 80e9, 2e12, 64e9, 25e9),
    Device("h100", "H100", "gpu", 9.0, 989e12, 495e12, 80e9, 3.35e12, 450e9, 50e9),
    Device("b200", "B200", "gpu", 10.0, 2250e12, 1125e12, 180e9, 8e12, 900e9, 50e9),
    Device("a100-80g", "A100", "gpu", 8.0, 312e12, 156e12, 80e9, 2.039e12, 300e9, 25e9),
    Device("a100-40g", "A100", "gpu", 8.0, 312e12, 156e12, 40e9, 1.555e12, 300e9, 25e9),
    Device("l40s", "L40S", "gpu", 8.9, 362e12, 183e12, 48e9, 864e9, 32e9, 6.25e9),
    Device("l4", "L4", "gpu", 8.9, 121e12, 60e12, 24e9, 300e9, 32e9, 1.56e9),
    Device("v100", "V100", "gpu", 7.0, 125e12, 15.7e12, 16e9, 900e9, 150e9, 6.25e9),
    Device("t4", "T4", "gpu", 7.5, 65e12, 8.1e12, 16e9, 320e9, 16e9, 1.56e9),
    # A chip of tpu7x, v3 or v2 is two devices.
    Device("tpu7x", "TPU7x", "tpu", None, 1153.5e12, 1153.5e12, 96 * 2**30, 3.69e12, 300e9, 6.25e9),
    Device("v6e", "TPU v6", "tpu", None, 918e12, 918e12, 32 * 2**30, 1.64e12, 400e9, 12.5e9),
    Device("v5e", "TPU v5 lite", "tpu", None, 197e12, 197e12, 16 * 2**30, 819e9, 200e9, 3.125e9),
    Device("v5e", "TPU v5e", "tpu", None, 197e12, 197e12, 16 * 2**30, 819e9, 200e9, 3.125e9),
    Device("v5p", "TPU v5", "tpu", None, 459e12, 459e12, 95 * 2**30, 2.765e12, 600e9, 6.25e9),
    Device("v4", "TPU v4", "tpu", None, 275e12, 275e12, 32 * 2**30, 1.228e12, 300e9, 6.25e9),
    Device("v3", "TPU v3", "tpu", None, 61.5e12, 61.5e12, 16 * 2**30, 450e9, 164e9, 1.56e9),
    Device("v2", "TPU v2", "tpu", None, 22.5e12, 22.5e12, 8 * 2**30, 350e9, 124e9, 1.56e9),
)


def find_device(name: str) -> Device:
    """Return the accelerator with a name such as ``a100-40g``, in upper or lower case."""
    known = {device.name: device for device in DEVICES}
    if name.lower() not in known:
        raise InputError(f"device is {name!r}; expected one of {', '.join(known)}, cpu")
    return known[name.lower()]


CGROUP = Path("/sys/fs/cgroup")


def best_dtype(device: jax.Device | None = None) -> DType:
    """Return the dtype to compute in on a device: bfloat16 where the hardware has it, else float32.

    GPUs below compute capability 8.0, such as Colab's T4, only emulate bfloat16. Default: the device that is compiled
    for (:func:`slm_jax.nn.target.target`).
    """
    platform, capability = target() if device is None else target_of(device)
    return "bfloat16" if platform == "tpu" or (capability or 0) >= 8 else "float32"


def run_dtype(config: BaseRunConfig) -> DType:
    """Return the dtype that a run computes in: the configured one, or the best for the device."""
    return best_dtype() if config.model.dtype == "auto" else config.model.dtype


def device_here(device: jax.Device | None = None) -> Device | None:
    """Return the kind of a device, by default the first; None for a CPU or an unknown accelerator."""
    kind = (device or jax.devices()[0]).device_kind
    return next((known for known in DEVICES if re.search(rf"{known.kind}(?!\d)", kind)), None)


def peak_flops(dtype: DType, device: jax.Device | None = None) -> float | None:
    """Return the peak FLOP/s of one device in a dtype, see :class:`Device`; None: unknown."""
    known = device_here(device)
    return known.peak(dtype) if known else None


def forward_flops(cfg: GPTConfig, tokens: float, seen: float, n_logits: float) -> float:
    """Count the FLOPs of a forward pass: 2 for each parameter and token, and 4 · layers · width for each pair attended.

    Each of the ``tokens`` attends to ``seen`` tokens on average; ``n_logits`` positions have their logits computed.
    """
    sizes = axis_sizes(cfg)
    multiplied = count(param_shapes(cfg), lambda axes: not axes.is_table and "vocab" not in axes.outputs)
    pairs = 4.0 * sizes["layers"] * sizes["heads"] * sizes["head_dim"] * seen
    return (2.0 * multiplied + pairs) * tokens + 2.0 * sizes["embed"] * sizes["vocab"] * n_logits


def flops_per_token(cfg: GPTConfig) -> float:
    """Return the FLOPs of training on one token: 6·N + 12·layers·width·context (Chowdhery et al. 2022, appendix B).

    N leaves out embeddings that are only looked up. The backward pass takes twice the FLOPs of the forward pass.
    """
    return 3 * forward_flops(cfg, 1, cfg.context_length, 1)


def device_memory(device: jax.Device | None = None) -> int | None:
    """Return the memory of one device in bytes; for a CPU device, its share of the machine's; None: unknown."""
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        memory = machine_memory()
        return memory and memory // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def machine_memory() -> int | None:
    """Return the available memory in bytes, including reclaimable caches; outside Linux, all memory.

    In a container with a memory limit (cgroup v2), at most the rest of the limit.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return int(min(available, _left_of_limit(CGROUP)))
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_of_limit(cgroup: Path) -> float:
    """Return the bytes left of a control group's limit, counting caches as free; infinity without a limit."""
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return math.inf


def environment(n_devices: int) -> dict[str, Any]:
    """Return what the numbers of a run depend on besides its configuration."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": n_devices,
        "processes": jax.process_count(),
        "threads": len(affinity(0)) if affinity else os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "flax", "optax")},
    }


def rounding_changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys that affect rounding and differ between two environments."""
    keys = ("device", "devices", "processes", "threads", "jax")
    return [key for key in keys if was.get(key, now[key]) != now[key]]
