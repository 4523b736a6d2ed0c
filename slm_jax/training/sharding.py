"""How devices share the work: the mesh of a run, and the shardings on it, by the rules of :mod:`slm_jax.nn.sharding`.

``jax.jit`` does the rest. A single device is a mesh of one.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from slm_jax.errors import InputError
from slm_jax.nn.sharding import MESH_AXES, ROWS, state_shardings
from slm_jax.training.config import MeshConfig


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over all devices (default: those of all processes); see :func:`mesh_sizes`.

    With several slices of a pod, ``replica`` is the axis over slices, between which the network is slower.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(mesh_sizes(cfg, len(devices)).values())
    n_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if n_slices == cfg.replica > 1:
        of_slices = (n_slices, *(1 for _ in sizes[1:]))
        array = mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), of_slices, devices)
        return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def mesh_sizes(cfg: MeshConfig, n_devices: int) -> dict[str, int]:
    """Return the size of each axis of the mesh; their product must be ``n_devices``."""
    sizes = {name: getattr(cfg, name) for name in MESH_AXES}
    others = math.prod(size for name, size in sizes.items() if name != "data")
    if cfg.data == -1:
        sizes["data"] = n_devices // others
    if math.prod(sizes.values()) != n_devices:
        shown = [f"mesh.{k} is {v}" for k in MESH_AXES if (v := getattr(cfg, k)) > 1 or (k == "data" and v != -1)]
        if cfg.data == -1 and len(shown) == 1:
            raise InputError(f"{shown[0]}; expected a divisor of the {n_devices} device(s)")
        product = "numbers whose product " + ("divides" if cfg.data == -1 else "is")
        raise InputError(f"{' and '.join(shown)}; expected {product} the {n_devices} device(s)")
    return sizes


def describe_heads(cfg: MeshConfig, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return a warning if ``mesh.tensor`` does not divide the heads of a model with axes of these sizes."""
    if (heads := sizes["kv_heads"]) % cfg.tensor == 0:
        return ()
    fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
    problem = f"mesh.tensor is {cfg.tensor}, which does not divide the model's {heads} heads"
    return (f"warning: {problem}: each device computes the attention of all (divisors: {fitting or 'none'})",)


def row_shards(mesh: Mesh) -> int:
    """Return the number of parts that a batch is split into."""
    return math.prod(mesh.shape.get(name, 1) for name in ROWS)


def compiler_options(platform: str, n_devices: int, environ: Mapping[str, str] = os.environ) -> dict[str, bool]:
    """Return XLA's options for a training step: let several GPUs compute while they exchange gradients.

    On a TPU this is the default. A setting in ``XLA_FLAGS`` is kept.
    """
    name = "xla_gpu_enable_latency_hiding_scheduler"
    wanted = platform == "gpu" and n_devices > 1 and name not in environ.get("XLA_FLAGS", "")
    return {name: True} if wanted else {}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch's first axis."""
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in ROWS if name in mesh.axis_names)))


def host_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Return the rows of the global batch that this process's devices hold, in ascending order.

    They need not be contiguous: a mesh may interleave hosts, as on TPU slices of four and more.
    """
    here = jax.process_index()
    index_of: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((batch_size,))
    held = [np.arange(batch_size)[index] for device, index in index_of.items() if device.process_index == here]
    return np.unique(np.concatenate(held))


def of_first_host(make: Callable[[], str]) -> str:
    """Return a SHA-256, in hexadecimal, that only the first host computes."""
    if jax.process_count() == 1:
        return make()
    digest = bytes.fromhex(make()) if jax.process_index() == 0 else bytes(32)
    return bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(digest, np.uint8))).hex()


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Place this process's rows of a batch (:func:`host_rows`) on its devices; the result is the global batch."""
    sharding, n_parts = batch_sharding(mesh), row_shards(mesh)
    parts = host_rows(mesh, n_parts)  # parts of the batch on this process's devices

    def place(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(parts)

        def part(index: Any) -> np.ndarray:
            first = size * int(np.searchsorted(parts, (index[0].start or 0) // size))
            return rows[first : first + size]

        return jax.make_array_from_callback((n_parts * size, *rows.shape[1:]), sharding, part)

    return {name: place(rows) for name, rows in batch.items()}


def put_params(mesh: Mesh, params: Any) -> Any:
    """Shard params, of which every process has a full copy, over the devices (:func:`state_shardings`)."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, params, state_shardings(mesh, params))
