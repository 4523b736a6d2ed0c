"""The limits of a device, FLOP/s and memory bandwidth, from data sheets or measured here."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from slm_jax.model import DType
from slm_jax.training.hardware import Device, device_here, find_device

Peak = float | Literal["measured"] | None

_SECONDS = 1.0  # of each measurement
_PRODUCTS = 4  # in a row, so that starting them does not count


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """FLOP/s and bytes a second of one device, None where unknown, and where they come from, in words."""

    flops: float | None
    bandwidth: float | None
    source: str

    def bounds(self, flops: float | None, n_bytes: float | None) -> dict[str, float]:
        """Return the lower bounds, in seconds, of so many FLOPs and so many bytes on one device, where known."""
        bounds = {}
        if self.flops and flops:
            bounds["arithmetic"] = flops / self.flops
        if self.bandwidth and n_bytes:
            bounds["memory"] = n_bytes / self.bandwidth
        return bounds


def find_ceilings(dtype: DType, device: str | None, peak: Peak) -> Ceilings:
    """Return the limits of a device, None: the one here, whose bandwidth is measured if it has no data sheet.

    ``peak`` is the FLOP/s to use instead of the data sheet's; ``measured``: measure both limits here.
    """
    known = device_here() if device is None else named_device(device)
    if peak == "measured":
        return Ceilings(measure_flops(dtype), measure_bandwidth(), "measured here")
    source = "peak unknown" if peak is None else "peak as given"
    if known is None:
        here = device is None
        where = "measured here" if here else "unknown"
        return Ceilings(peak, measure_bandwidth() if here else None, f"{source}; bandwidth {where}")
    if peak is None:
        return Ceilings(known.peak(dtype), known.bandwidth, f"data sheet of {known.name}")
    return Ceilings(peak, known.bandwidth, f"{source}; bandwidth from the data sheet of {known.name}")


def named_device(name: str) -> Device | None:
    """Return the accelerator of a name; None for ``cpu``, which has no data sheet."""
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
