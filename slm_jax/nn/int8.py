"""Matrices in 8 bits: a quarter of the memory of float32, and as much less to read for each token.

Each output has a scale of its own, the largest absolute weight / 127 (symmetric, weights only). Activations stay as
they are: on a CPU, where XLA multiplies 8 bits fast only with 8 bits, each row of them is written as two 8-bit digits,
which leaves an error of 1/64,000 of the largest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import Float
from jaxtyping import Int8 as Int8Array

from slm_jax.nn.axes import STACK, Axes, Params, find_axes
from slm_jax.nn.target import target

LARGEST = 127
DIGITS = 2  # of an activation, to the base 254: 24 bits, as many as float32 has


class Int8(NamedTuple):
    """A matrix as ``values`` · ``scale``; (outputs..., inputs), as a CPU multiplies a single row fastest."""

    values: Any  # int8 (outputs..., inputs), all inputs in one axis
    scale: Any  # float32 (outputs...)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """Return the matrix, (outputs..., inputs)."""
        return (self.values.astype(jnp.float32) * self.scale[..., None]).astype(dtype)


def read_int8(layer: Any) -> Int8 | None:
    """Return the matrix of a Flax module if its parameters have it in 8 bits."""
    if not layer.has_variable("params", "int8"):
        return None
    return Int8(*(jnp.asarray(layer.get_variable("params", name)) for name in ("int8", "scale")))


# Layers of a block with the same input, and the one that has all their outputs: fewer products for each token.
SIDE_BY_SIDE = {"qkv": ("q", "k", "v"), "gate_fc": ("gate", "fc")}


@jax.jit
def quantize(params: Params) -> Params:
    """Return a model's parameters with its matrices in 8 bits, for generation and evaluation on one device.

    A leaf ``kernel`` (or ``embedding``) becomes ``int8`` (stack, outputs..., inputs) and ``scale`` (stack, outputs...);
    the rows of the token embedding count as outputs, as they are for a tied head. Layers with the same input become
    one, ``qkv`` and ``gate_fc``. Position embeddings, norms, biases, adapters and a classifier's head stay as they are.
    """
    flat = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        axes, place = find_axes(path), path.rpartition("/")[0]
        if axes is None or not axes.is_matrix or axes.is_adapter or {"positions", "classes"} & set(axes.names):
            flat[path] = leaf
        else:
            flat[f"{place}/int8"], flat[f"{place}/scale"] = _quantize(_outputs_first(axes, leaf))
    tree = unflatten_dict(flat, sep="/")
    stacks = {name: part for name, part in tree.items() if name.startswith(STACK)}
    return {**tree, **{name: jax.tree.map(_side_by_side, part, is_leaf=_is_part) for name, part in stacks.items()}}


def _outputs_first(axes: Axes, leaf: Array) -> Array:
    """Return a matrix as (stack, outputs..., inputs), all inputs in one axis."""
    if axes.is_table:
        return leaf
    stack, inputs = len(axes.stack), len(axes.inputs)
    matrix = jnp.moveaxis(leaf, range(stack, stack + inputs), range(-inputs, 0))
    return matrix.reshape(*matrix.shape[:-inputs], -1)


def _quantize(matrix: Array) -> Int8:
    matrix = matrix.astype(jnp.float32)
    scale = jnp.max(jnp.abs(matrix), axis=-1) / LARGEST
    return Int8(jnp.round(matrix / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale)


def _is_part(tree: Any) -> bool:
    return isinstance(tree, dict) and any(set(names) <= set(tree) for names in SIDE_BY_SIDE.values())


def _side_by_side(part: Any) -> Any:
    """Return a part of a block with the layers that have the same input as one; any other leaf as it is."""
    for together, names in SIDE_BY_SIDE.items() if _is_part(part) else ():
        if set(names) <= set(part):
            layers = [part[name] for name in names]
            joined = {leaf: jnp.concatenate([_flat(leaf, layer[leaf]) for layer in layers], 1) for leaf in layers[0]}
            part = {**{name: layer for name, layer in part.items() if name not in names}, together: joined}
    return part


def _flat(name: str, leaf: Array) -> Array:
    """Return a leaf of a layer with its outputs, such as heads and their width, in one axis."""
    return leaf.reshape(leaf.shape[0], -1, leaf.shape[-1]) if name == "int8" else leaf.reshape(leaf.shape[0], -1)


def times_int8(x: Float[Array, "*batch inputs"], matrix: Int8, dtype: Any = None) -> Float[Array, "*batch_and_outputs"]:
    """Multiply the last axis of x with a matrix; the result has ``dtype``, by default x's."""
    values = matrix.values.reshape(-1, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    if target().platform == "cpu":
        product = _times_digits(rows.astype(jnp.float32), values)
    else:  # compilers for GPUs and TPUs convert the matrix as they read it
        product = jnp.matmul(rows, values.astype(x.dtype).T, preferred_element_type=jnp.float32)
    product = product.reshape(*x.shape[:-1], *matrix.scale.shape) * matrix.scale
    return product.astype(dtype or x.dtype)


def _times_digits(rows: Float[Array, "rows inputs"], values: Int8Array[Array, "outputs inputs"]) -> Array:
    """Multiply float32 rows, written as (high + low / 254) · unit, with int8 values."""
    unit = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), 1e-30) / LARGEST
    high = jnp.round(rows / unit)
    low = jnp.round((rows / unit - high) * 2 * LARGEST)
    digits = jnp.concatenate([high, low]).astype(jnp.int8)
    products = jax.lax.dot_general(digits, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    high, low = jnp.split(products.astype(jnp.float32), 2)
    return (high + low / (2 * LARGEST)) * unit
