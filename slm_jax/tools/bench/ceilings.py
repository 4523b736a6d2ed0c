"""What limits any program on a device: arithmetic and the memory's bandwidth, from data sheets or measured here."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from slm_jax.model import DType
from slm_jax.training.hardware import Device, device_here, find_device

_SECONDS = 1.0  # of each measurement
_PRODUCTS = 4  # in a row, so that starting them does not count


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What one device can do at most.

    Attributes:
        flops: FLOP/s; None: not known.
        bandwidth: bytes a second; None: not known.
        source: where they come from, for a person.
    """

    flops: float | None
    bandwidth: float | None
    source: str

    def bounds(self, flops: float | None, n_bytes: float | None) -> dict[str, float]:
        """Return the least seconds that so much arithmetic, and so many bytes, take of one device, where known."""
        bounds = {}
        if self.flops and flops:
            bounds["arithmetic"] = flops / self.flops
        if self.bandwidth and n_bytes:
            bounds["memory"] = n_bytes / self.bandwidth
        return bounds


def find_ceilings(dtype: DType, device: str | None, peak: float | Literal["measured"] | None) -> Ceilings:
    """Return what a device can do in ``dtype``; of the device here, where no data sheet is, bandwidth as measured.

    Args:
        dtype: of the matrix products.
        device: a name of :data:`slm_jax.training.hardware.DEVICES`, or cpu; None: the device here.
        peak: FLOP/s instead of the data sheet's; ``measured``: both limits as measured here.

    Raises:
        InputError: an unknown device.
    """
    known = device_here() if device is None else named_device(device)
    if peak == "measured":
        return Ceilings(measure_flops(dtype), measure_bandwidth(), "measured here")
    of_peak = "peak not known" if peak is None else "peak as given"
    if known is None and device is None:
        return Ceilings(peak, measure_bandwidth(), f"{of_peak}; bandwidth measured here")
    if known is None:
        return Ceilings(peak, None, f"{of_peak}; bandwidth not known")
    sheet = f"data sheet of {known.name}"
    if peak is None:
        return Ceilings(known.peak(dtype), known.bandwidth, sheet)
    return Ceilings(peak, known.bandwidth, f"{of_peak}; bandwidth from the {sheet}")


def named_device(name: str) -> Device | None:
    """Return the accelerator of a name; None for ``cpu``, of which nothing is known.

    Raises:
        InputError: an unknown name.
    """
    return None if name.lower() == "cpu" else find_device(name)


def measure_flops(dtype: DType) -> float:
    """Return the FLOP/s of large matrix products in ``dtype`` on the first device, at best."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype) / jnp.sqrt(size).astype(dtype)

    @jax.jit
    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: x @ matrix, x)

    return 2.0 * size**3 * _PRODUCTS / _fastest(lambda: products(matrix).block_until_ready())


def measure_bandwidth() -> float:
    """Return the bytes a second at which the first device sums an array larger than its caches, at best."""
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
