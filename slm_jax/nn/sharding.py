"""How named axes are split over a mesh of devices: the one table of rules, and what applies it inside a model.

A mesh has four axes. Rows of a batch are split over the first three. ``replica`` counts slices of a pod, between which
only gradients travel; ``data`` copies of the parameters; along ``fsdp`` parameters and optimizer state are split, and a
block's weights are gathered when it is their turn (Rajbhandari et al. 2020); along ``tensor`` each device computes its
own heads, hidden features and vocabulary (Shoeybi et al. 2019). ``jax.jit`` inserts the communication.

Without a mesh (``jax.set_mesh``), or on one device, nothing here does anything.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.errors import InputError
from slm_jax.nn.axes import Axes, map_axes

COPIES = ("replica", "data")  # devices along these have the same parameters
ROWS = (*COPIES, "fsdp")
MESH_AXES = (*ROWS, "tensor")

# By named axis of a parameter (slm_jax.nn.axes) or an activation, the axes of the mesh that split it.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ROWS,  # of activations, whose width is whole on each device
    "embed": ("fsdp",),  # of parameters; where it does not divide, their largest other axis
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
SMALLEST = 2**12  # parameters with fewer numbers are whole on every device


def param_spec(axes: Axes | None, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Return how a parameter is split over a mesh with axes of these ``sizes``; axes that do not divide are whole.

    ``fsdp`` splits the width of the residual stream, else the largest axis that is left; never the layers', which are
    taken one by one.
    """
    if axes is None or math.prod(shape) < SMALLEST:
        return PartitionSpec()
    rules = [RULES.get(name) for name in axes.names]
    spec: list[str | None] = [None] * len(shape)

    def divided_by(name: str) -> list[int]:
        n = sizes.get(name, 1)
        return [i for i, size in enumerate(shape) if n > 1 and size % n == 0 and spec[i] is None]

    if features := [i for i in divided_by("tensor") if rules[i] == ("tensor",)]:
        spec[features[0]] = "tensor"
    if others := [i for i in divided_by("fsdp") if axes.names[i] != "layers"]:
        spec[max(others, key=lambda i: (rules[i] == ("fsdp",), shape[i]))] = "fsdp"
    return PartitionSpec(*spec) if any(spec) else PartitionSpec()


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of every leaf of a tree (arrays or shapes; params, or any part of a training state)."""

    def leaf_sharding(axes: Axes | None, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(axes, leaf.shape, mesh.shape))

    return map_axes(leaf_sharding, tree)


def spread(sharding: Any, tree: Any) -> Any:
    """Return ``sharding``, one for all leaves or a tree of them; for a mesh that of every leaf of ``tree``."""
    return state_shardings(sharding, tree) if isinstance(sharding, Mesh) else sharding


def on_mesh_of(tree: Any) -> AbstractContextManager[Any]:
    """Name the mesh of several devices that the arrays of a tree are split over, if there is one."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
    mesh = next((mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.size > 1), None)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def free_axes(names: tuple[str, ...] = MESH_AXES) -> tuple[str, ...]:
    """Return those of the mesh's axes that have several devices and are not taken by a ``jax.shard_map`` around.

    InputError: the mesh has axes that the compiler may not divide (Explicit, the default of ``jax.make_mesh``).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    if mesh.size > 1 and mesh.explicit_axes:
        remedy = "AxisType.Auto for each, such as jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,))"
        raise InputError(f"the mesh's axes {', '.join(mesh.explicit_axes)} are AxisType.Explicit; expected {remedy}")
    return tuple(name for name in names if mesh.shape.get(name, 1) > 1 and name not in mesh.manual_axes)


def n_devices(axes: tuple[str, ...]) -> int:
    """Return the number of devices along axes of the mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def splits(name: str, size: int) -> tuple[str, ...]:
    """Return the axes of the mesh that split a named axis of this size; none if they do not divide it."""
    axes = free_axes(RULES.get(name, ()))
    return axes if axes and size % n_devices(axes) == 0 else ()


def constrain(x: Array, *names: str | None) -> Array:
    """Split an activation by the names of its axes; an axis without a name, or that does not divide, is whole."""
    if not free_axes():
        return x
    spec = PartitionSpec(
        *(splits(name, size) or None if name else None for name, size in zip(names, x.shape, strict=True))
    )
    return jax.lax.with_sharding_constraint(x, spec)


def on_each_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Map a function over the shards of its arguments, by hand along every axis that is not yet mapped."""
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.axis_names) - set(mesh.manual_axes)
    # Its check would need the axes along which the values of loops and kernels vary.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def attend_on_each_device(attend: Callable[..., Array], q: Array, k: Array, v: Array, of_rows: Array | None) -> Array:
    """Map attention over the rows and heads of each device; where the devices do not divide them, each computes all.

    The compiler cannot divide a kernel that it does not know, and where a ``jax.shard_map`` has mapped a part of the
    axes, JAX asks that all be mapped.

    Args:
        attend: from arguments of these shapes, or of one device's part of them, to the context, shaped like q.
        q: (batch, seq, heads, head_dim).
        k, v: (batch, seq, kv_heads, head_dim); where the devices do not divide these heads, each has all of q's, too.
        of_rows: an array that may have the rows, too, as its first axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    known = set(free_axes(mesh.axis_names)) <= set(MESH_AXES)
    if mesh.size == 1 or set(mesh.axis_names) == set(mesh.manual_axes) or not known:
        return attend(q, k, v, of_rows)
    rows, heads = splits("batch", len(q)) or None, splits("kv_heads", k.shape[2]) or None
    of_heads = PartitionSpec(rows, None, heads)
    same_rows = PartitionSpec(rows if of_rows is not None and len(of_rows) == len(q) else None)
    return on_each_device(attend, (of_heads, of_heads, of_heads, same_rows), of_heads)(q, k, v, of_rows)


def draw_rows(draw: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...]) -> Array:
    """Draw random numbers for this device's rows of a batch that a ``jax.shard_map`` around has cut.

    Those of the whole batch are drawn and cut likewise, so that they do not depend on the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in COPIES if not mesh.empty and name in mesh.manual_axes)
    if not axes:
        return draw(shape)
    whole = draw((shape[0] * n_devices(axes), *shape[1:]))
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axes) * shape[0], shape[0])
