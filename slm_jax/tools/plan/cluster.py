"""Devices by name and number: ``v5e-64``, ``v5p-8``, ``h100x8``, ``v5e-256x2``; how many hosts, slices and links."""

import dataclasses
import math
import re
from typing import NamedTuple

from slm_jax.errors import InputError
from slm_jax.training.hardware import DEVICES, Device, find_device

GPUS_PER_HOST = 8


class _Torus(NamedTuple):
    """The slices of a TPU generation, as Google Cloud offers and names them."""

    n_dims: int
    cores: int  # per chip: what the number in a slice's name counts; 1: it counts chips
    devices: int  # per chip, as JAX counts them
    most: int  # chips of the largest slice


_TORI = {
    "v2": _Torus(2, 2, 2, 256),
    "v3": _Torus(2, 2, 2, 1024),
    "v4": _Torus(3, 2, 1, 4096),
    "v5e": _Torus(2, 1, 1, 256),
    "v5p": _Torus(3, 2, 1, 8960),
    "v6e": _Torus(2, 1, 1, 256),
    "tpu7x": _Torus(3, 2, 2, 9216),
}
_CHIPS_PER_HOST = 4
_NAME = re.compile(r"(?P<kind>.+?)(?:-(?P<count>\d+)|:(?P<shape>\d+(?:x\d+)+))?(?:x(?P<times>\d+))?")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Devices that share each batch.

    Attributes:
        name: as the user gave it.
        device: the kind of device; None: this machine's CPU.
        n_devices: all of them, as JAX counts them.
        topology: chips of one TPU slice along each axis of its torus; empty where none was named, and for GPUs.
        n_slices: TPU slices, between which there is only the data center's network.
    """

    name: str
    device: Device | None
    n_devices: int = 1
    topology: tuple[int, ...] = ()
    n_slices: int = 1

    @property
    def is_gpu(self) -> bool:
        return self.device is not None and self.device.platform == "gpu"

    @property
    def n_hosts(self) -> int:
        """Machines: of 8 GPUs; of 4 TPU chips, 8 of a v5e or v6e if one slice has no more."""
        if self.device is None:
            return 1
        if self.is_gpu:
            return -(-self.n_devices // GPUS_PER_HOST)
        torus = _TORI[self.device.name]
        chips = self.n_devices // (torus.devices * self.n_slices)
        per_host = 8 if torus.n_dims == 2 and torus.cores == 1 and chips == 8 else _CHIPS_PER_HOST
        return self.n_slices * max(1, -(-chips // per_host))

    @property
    def domain(self) -> int:
        """Devices that fast links join: the GPUs of a host, or a slice; domains are joined by the network."""
        return min(self.n_devices, GPUS_PER_HOST) if self.is_gpu else self.n_devices // self.n_slices

    def scatters(self, n_devices: int) -> bool:
        """Whether XLA's compiler has a reduce-scatter for so many of the devices.

        That of TPUs (libtpu 0.0.52) has one for four chips, or a slice of two rows; elsewhere it sums the whole array
        on every chip, even if the program asks for a reduce-scatter.
        """
        axes = [size for size in self.topology if size > 1]
        return self.is_gpu or n_devices <= 4 or (len(axes) <= 2 and min(axes, default=1) <= 2)


def find_cluster(name: str, n_devices: int = 1) -> Cluster:
    """Return the devices with a name such as ``h100``, ``h100x8``, ``v5e-64``, ``v5p:2x2x2``, ``v5e-256x2`` or ``cpu``.

    ``n_devices`` counts them where the name does not. The number in the name of a slice of v2, v3, v4, v5p and tpu7x
    counts cores, two a chip, as Google Cloud's names do.

    Raises:
        InputError: a name or number that does not exist.
    """
    lower = name.lower().replace("v5litepod", "v5e")  # Google Cloud's name of the type
    if lower == "cpu":
        return Cluster(lower, None, n_devices)
    match = _NAME.fullmatch(lower)
    if match and match["kind"] == "cpu":
        raise InputError(f"device is {name!r}; expected cpu, with --devices {match['times'] or match['count']}")
    named = {device.name for device in DEVICES}
    if lower in named or match is None:
        device = find_device(lower)
        return _gpus(lower, device, n_devices) if device.platform == "gpu" else Cluster(lower, device, n_devices)
    device, times = find_device(match["kind"]), int(match["times"] or 1)
    if n_devices > 1:
        raise InputError(f"device {name} has a number; leave out --devices {n_devices}")
    if device.platform == "gpu":
        if match["count"] or match["shape"]:
            raise InputError(f"device is {name!r}; expected a number of GPUs, such as {device.name}x8")
        return _gpus(lower, device, times)
    topology = _topology(name, device, match["count"], match["shape"])
    if times == 0:
        raise InputError(f"device is {name!r}; expected a number of slices from 1")
    return Cluster(lower, device, math.prod(topology) * _TORI[device.name].devices * times, topology, times)


def _gpus(name: str, device: Device, n_devices: int) -> Cluster:
    if n_devices < 1 or (n_devices > GPUS_PER_HOST and n_devices % GPUS_PER_HOST):
        hosts = f"up to {GPUS_PER_HOST}, or a multiple of {GPUS_PER_HOST} ({GPUS_PER_HOST} on a host)"
        raise InputError(f"device is {name} with {n_devices} GPUs; expected {hosts}")
    return Cluster(name, device, n_devices)


def _topology(name: str, device: Device, count: str | None, shape: str | None) -> tuple[int, ...]:
    """Return the chips of a slice along each axis, given by the number in its name or as a shape."""
    torus = _TORI[device.name]
    if shape:
        topology = tuple(int(size) for size in shape.split("x"))
        if len(topology) != torus.n_dims or not 1 <= math.prod(topology) <= torus.most:
            raise InputError(
                f"device is {name!r}; expected {torus.n_dims} sizes of at most {torus.most:,} chips, such as "
                f"{device.name}:{'x'.join(map(str, _torus_shape(8, torus.n_dims)))}"
            )
        return topology
    sizes, example = _sizes(device), "x".join(map(str, _torus_shape(16, torus.n_dims)))
    if int(count or 0) not in sizes:
        cores = f" ({torus.cores} cores a chip)" if torus.cores > 1 else ""
        numbers = f"{', '.join(map(str, sizes[:4]))}, … {sizes[-1]}{cores}"
        raise InputError(
            f"device is {name!r}; expected {device.name}-N, N one of {numbers}, or a shape such as "
            f"{device.name}:{example}"
        )
    return _torus_shape(int(count or 0) // torus.cores, torus.n_dims)


def _sizes(device: Device) -> list[int]:
    """Return the numbers that names of slices have: powers of two, at least a host of 4 chips (or one chip of v5e)."""
    torus = _TORI[device.name]
    least = [1] if torus.cores == 1 else []
    return [torus.cores * chips for chips in [*least, *(2**k for k in range(2, 14))] if chips <= torus.most]


def _torus_shape(chips: int, n_dims: int) -> tuple[int, ...]:
    """Return Google Cloud's shape of a slice of ``chips`` (a power of two): as even as possible, the larger last."""
    exponent = chips.bit_length() - 1
    sizes = [2 ** ((exponent + axis) // n_dims) for axis in range(n_dims)]
    return (2, 2, 1) if sizes == [1, 2, 2] else tuple(sizes)
