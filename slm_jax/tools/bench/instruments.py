"""What measurements are made with: repeated timing, peak memory, fresh processes, and the limits of a device."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import InputError
from slm_jax.model import DType
from slm_jax.training.hardware import Device, device_here, find_device

Clock = Callable[[], float]
Peak = float | Literal["measured"] | None

_SECONDS = 1.0  # of each measurement of a limit
_PRODUCTS = 4  # in a row, so that starting them does not count


# --- Time ---


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repeated measurements of one duration, in order; at least one."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        first, third = np.percentile(self.seconds, [25, 75])
        return float(first), float(third)

    def to_dict(self) -> dict[str, Any]:
        extent = (min(self.seconds), max(self.seconds))
        return {"median": self.median, "quartiles": self.quartiles, "range": extent, "repeats": self.seconds}

    def __str__(self) -> str:
        scale, unit = (1e3, "ms") if self.median < 1 else (1, "s")
        low, high = (scale * quartile for quartile in self.quartiles)
        spread = f"{low:.4g}-{high:.4g}; {scale * min(self.seconds):.4g}-{scale * max(self.seconds):.4g}"
        return f"{scale * self.median:.4g} {unit}" + (f" ({spread})" if len(self.seconds) > 1 else "")


def time_calls(run: Callable[[], object], *, warmup: int, repeats: int, clock: Clock = time.perf_counter) -> Timing:
    """Time ``repeats`` calls of ``run``, which waits for its own result, after ``warmup`` that are not timed."""
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repeats):
        began = clock()
        run()
        seconds.append(clock() - began)
    return Timing(tuple(seconds))


# --- Memory ---


@dataclasses.dataclass
class PeakMemory:
    """The peak of the memory in use, in bytes (None: unknown on this system), and what it is of, in words."""

    n_bytes: int | None
    of: str


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure a peak, which is set at the end."""
    if jax.default_backend() == "cpu":
        peak = PeakMemory(None, "the process, beyond what it held before")
        with contextlib.suppress(OSError):  # where it cannot be reset, the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
        before = process_bytes("VmRSS")
        yield peak
        most = process_bytes("VmHWM")
        peak.n_bytes = None if most is None or before is None else most - before
    else:
        peak = PeakMemory(None, "a device, since the process began")
        yield peak
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        peak.n_bytes = max((found for found in peaks if found is not None), default=None)


def process_bytes(field: str) -> int | None:
    """Return a size of this process from Linux: VmRSS, held now, or VmHWM, the peak."""
    if sys.platform != "linux":
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else None


# --- Processes ---


def start_python(args: Sequence[str], environ: Mapping[str, str] = os.environ) -> "subprocess.Popen[str]":
    paths = [str(Path(__file__).parents[3]), *filter(None, [environ.get("PYTHONPATH")])]
    environ = {**environ, "PYTHONPATH": os.pathsep.join(paths)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *args], env=environ, text=True, stdout=pipe, stderr=pipe)


def output_of(process: "subprocess.Popen[str]") -> str:
    """Return what a process prints until its end; if it fails, an InputError has the last line of its stderr."""
    printed, errors = process.communicate()
    if process.returncode:
        reason = (errors.strip().splitlines() or ["it was killed; out of memory?"])[-1]
        raise InputError(f"a process to measure in ended with status {process.returncode}: {reason}")
    return printed


# --- Limits of a device ---


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """FLOP/s and bytes a second of one device, None where unknown, and where they come from, in words."""

    flops: float | None
    bandwidth: float | None
    source: str

    def bounds(self, flops: float | None, n_bytes: float | None) -> dict[str, float]:
        """Return the lower bounds, in seconds, of so many FLOPs and so many bytes on one device, where known."""
        works = {"arithmetic": (flops, self.flops), "memory": (n_bytes, self.bandwidth)}
        return {name: work / rate for name, (work, rate) in works.items() if work and rate}

    def __str__(self) -> str:
        flops = format_flops(self.flops) if self.flops else "unknown FLOP/s"
        bandwidth = f"{self.bandwidth / 1e9:,.4g} GB/s" if self.bandwidth else "unknown GB/s"
        return f"{flops}, {bandwidth} ({self.source})"


def format_flops(rate: float) -> str:
    return f"{rate / 1e12:,.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.4g} GFLOP/s"


def find_ceilings(dtype: DType, device: str | None, peak: Peak) -> Ceilings:
    """Return the limits of a device; None: the one here, whose bandwidth is measured if it has no data sheet."""
    known = device_here() if device is None else named_device(device)
    if peak == "measured":
        return Ceilings(measure_flops(dtype), measure_bandwidth(), "measured here")
    if known is not None:
        source = f"data sheet of {known.name}" + ("" if peak is None else "; peak as given")
        return Ceilings(known.peak(dtype) if peak is None else peak, known.bandwidth, source)
    source = "peak unknown" if peak is None else "peak as given"
    if device is None:
        return Ceilings(peak, measure_bandwidth(), f"{source}; bandwidth measured here")
    return Ceilings(peak, None, f"{source}; bandwidth unknown")


def named_device(name: str) -> Device | None:  # None: cpu, which has no data sheet
    return None if name.lower() == "cpu" else find_device(name)


def measure_flops(dtype: DType) -> float:
    """Return the best FLOP/s of large matrix products in ``dtype`` on the first device."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype) / jnp.sqrt(size).astype(dtype)

    @jax.jit
    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: x @ matrix, x)

    return 2.0 * size**3 * _PRODUCTS / _fastest(lambda: products(matrix).block_until_ready())


def measure_bandwidth() -> float:
    """Return the best bytes a second at which the first device sums an array larger than its caches."""
    n_bytes = 256 << 20 if jax.default_backend() == "cpu" else 4 << 30
    array = jnp.ones(n_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return array.nbytes / _fastest(lambda: total(array).block_until_ready())


def _fastest(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of many calls, after one that compiles."""
    run()
    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    while (began := time.perf_counter()) < end:
        run()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest
