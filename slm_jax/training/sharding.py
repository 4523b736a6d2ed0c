"""How devices share the work: one mesh with the axes ``data`` and ``fsdp``; ``jax.jit`` does the rest.

Batches are split over both axes. Parameters and optimizer state are whole on every device along ``data`` and split
along ``fsdp``. One device is a mesh of one.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from slm_jax.errors import InputError
from slm_jax.nn.axes import Axes, map_axes
from slm_jax.training.config import MeshConfig

BATCH_SPEC = PartitionSpec(("data", "fsdp"))


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over all (or given) devices, with axes ``data`` and ``fsdp``; see :func:`mesh_sizes`."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(cfg, len(devices))
    return jax.make_mesh(sizes, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def mesh_sizes(cfg: MeshConfig, n_devices: int) -> tuple[int, int]:
    """Return the sizes of the axes ``data`` and ``fsdp`` over so many devices, which must be their product."""
    data = n_devices // cfg.fsdp if cfg.data == -1 else cfg.data
    if data * cfg.fsdp != n_devices:
        if cfg.data == -1:
            raise InputError(f"mesh.fsdp is {cfg.fsdp}; expected a divisor of the {n_devices} device(s)")
        given = f"mesh.data is {cfg.data} and mesh.fsdp is {cfg.fsdp}"
        raise InputError(f"{given}; expected numbers whose product is the {n_devices} device(s)")
    return data, cfg.fsdp


def compiler_options(platform: str, n_devices: int, environ: Mapping[str, str] = os.environ) -> dict[str, bool]:
    """Return XLA's options for a training step: several GPUs should compute while they exchange gradients.

    On a TPU this is XLA's default. A setting in ``XLA_FLAGS`` is kept.
    """
    name = "xla_gpu_enable_latency_hiding_scheduler"
    wanted = platform == "gpu" and n_devices > 1 and name not in environ.get("XLA_FLAGS", "")
    return {name: True} if wanted else {}


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of every leaf of a tree (arrays or shapes; any part of a training state).

    One axis is split along ``fsdp`` (:func:`split_axis`); small leaves are whole.
    """

    def leaf_sharding(axes: Axes | None, leaf: Any) -> NamedSharding:
        split = split_axis(axes, leaf.shape, mesh.shape["fsdp"])
        names = () if split is None else ("fsdp" if axis == split else None for axis in range(leaf.ndim))
        return NamedSharding(mesh, PartitionSpec(*names))

    return map_axes(leaf_sharding, tree)


def split_axis(axes: Axes | None, shape: tuple[int, ...], n_shards: int) -> int | None:
    """Return the axis of a parameter that ``n_shards`` devices split; None if each device has it whole.

    It is the width of the residual stream, else the largest other axis, of those that ``n_shards`` divides; never the
    layers', which are taken one by one.
    """
    if axes is None or n_shards == 1 or math.prod(shape) < 2**12:
        return None
    sizes = {
        axis: (name == "embed", size)
        for axis, (name, size) in enumerate(zip(axes.names, shape, strict=True))
        if name != "layers" and size % n_shards == 0
    }
    return max(sizes, key=lambda axis: sizes[axis], default=None)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch's first axis, over all devices."""
    return NamedSharding(mesh, BATCH_SPEC)


def host_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Return the rows of the global batch that this process's devices hold, in ascending order.

    They need not be neighbours: a mesh may interleave hosts, as on TPU slices of four and more.
    """
    here = jax.process_index()
    index_of: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((batch_size,))
    held = [np.arange(batch_size)[index] for device, index in index_of.items() if device.process_index == here]
    return np.unique(np.concatenate(held))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Place this process's rows of a batch (:func:`host_rows`) on its devices; the result is the global batch."""
    sharding, n_parts = batch_sharding(mesh), math.prod(mesh.shape[name] for name in BATCH_SPEC[0])
    indices: Iterable[Any] = sharding.addressable_devices_indices_map((n_parts,)).values()
    here = sorted({index[0].start or 0 for index in indices})  # the parts of the batch that this process has

    def place(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(here)

        def part(index: Any) -> np.ndarray:
            first = here.index((index[0].start or 0) // size) * size
            return rows[first : first + size]

        return jax.make_array_from_callback((n_parts * size, *rows.shape[1:]), sharding, part)

    return {name: place(rows) for name, rows in batch.items()}


def put_params(mesh: Mesh, params: Any) -> Any:
    """Place params that every process has whole on the devices, as :func:`state_shardings` says."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, params, state_shardings(mesh, params))
