"""LoRA (Hu et al. 2021): a large change of a frozen matrix as the product of two small ones, which are trained.

``y = x W + dropout(x) A B · alpha / rank``, with A random and B zero at the start, so that the first step starts from
exactly the model that is adapted. An adapter is part of the params tree: next to ``blocks/attn/out_proj`` is
``blocks/attn/out_proj_adapter`` with ``lora_a`` (layers, in, rank), ``lora_b`` (layers, rank, out) and the constants
``lora_scale`` and, with dropout, ``lora_drop_rate``. ``in`` and ``out`` are single axes, also where the matrix has
heads and their width. The model applies an adapter if it is there; its configuration does not change.
"""

import math
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from slm_jax.errors import InputError
from slm_jax.nn.axes import ADAPTER, STACK, TABLE, Params, find_axes
from slm_jax.nn.dropout import drop

TRAINED = ("lora_a", "lora_b")

# The matrices that can have an adapter, by the name that patterns match: blocks/attn/q is attn/q.
TARGETS: dict[str, str] = {
    path.removeprefix(f"{STACK}/").removesuffix("/kernel"): path.removesuffix("/kernel")
    for path, axes in TABLE.items()
    if axes.is_matrix and not axes.is_table
}


class Adapter(nn.Module):
    """Adds an adapter's change to ``y = x W`` if the params tree has one here, and otherwise returns ``y``."""

    @nn.compact
    def __call__(
        self, y: Float[Array, "*batch_and_outputs"], x: Float[Array, "*batch_and_inputs"], deterministic: bool = True
    ) -> Float[Array, "*batch_and_outputs"]:
        """Return ``y``, changed; the last axes of ``x`` and ``y`` may be heads and their width."""
        if not self.has_variable("params", "lora_a"):
            return y
        a, b, scale = (jnp.asarray(self.get_variable("params", name)) for name in (*TRAINED, "lora_scale"))
        x = x.reshape(-1, a.shape[0])
        if self.has_variable("params", "lora_drop_rate") and not deterministic:
            x = drop(x, jnp.asarray(self.get_variable("params", "lora_drop_rate")), self.make_rng("dropout"))
        change = (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
        return y + (change * scale.astype(x.dtype)).reshape(y.shape).astype(y.dtype)


def find_targets(params: Params, patterns: tuple[str, ...]) -> list[str]:
    """Return the targets in ``params`` (arrays or shapes) that patterns such as ``attn/*`` match.

    Raises:
        InputError: a pattern that matches none.
    """
    flat = flatten_dict(params, sep="/")
    present = [target for target, place in TARGETS.items() if f"{place}/kernel" in flat]
    for pattern in patterns:
        if not any(fnmatchcase(target, pattern) for target in present):
            raise InputError(f"lora.targets: {pattern!r} matches nothing; expected patterns of {', '.join(present)}")
    return [target for target in present if any(fnmatchcase(target, pattern) for pattern in patterns)]


def init_adapters(
    key: jax.Array, params: Params, targets: tuple[str, ...], *, rank: int, alpha: float, drop_rate: float = 0.0
) -> Params:
    """Make new adapters: A uniform within ±1/√in, from the key, B zero, in the matrices' dtype; and their constants.

    Args:
        params: the model's parameters, arrays or shapes, the blocks in one stack.
        targets: patterns of the matrices that get an adapter (:func:`find_targets`).
        alpha: the change is multiplied by alpha / rank.
        drop_rate: dropout on an adapter's input.

    Returns:
        The adapters alone; :func:`add_adapters` adds them to a params tree.

    Raises:
        InputError: a pattern that matches no matrix.
    """
    flat = flatten_dict(params, sep="/")
    constants = {"lora_scale": alpha / rank, **({"lora_drop_rate": drop_rate} if drop_rate else {})}
    adapters = {}
    for target in find_targets(params, targets):
        kernel = flat[f"{TARGETS[target]}/kernel"]
        stack, n_in, n_out = _matrix_shape(target, kernel.shape)
        bound = 1 / math.sqrt(n_in)
        own_key = jax.random.fold_in(key, list(TARGETS).index(target))  # independent of the other targets
        adapters[TARGETS[target] + ADAPTER] = {
            "lora_a": jax.random.uniform(own_key, (*stack, n_in, rank), kernel.dtype, -bound, bound),
            "lora_b": jnp.zeros((*stack, rank, n_out), kernel.dtype),
            **{name: jnp.full(stack, value, jnp.float32) for name, value in constants.items()},
        }
    return unflatten_dict(adapters, sep="/")


def _matrix_shape(target: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """Return the stacking axes of a kernel's shape, and its numbers of inputs and of outputs."""
    axes = find_axes(f"{TARGETS[target]}/kernel")
    assert axes is not None
    stack, inputs = len(axes.stack), len(axes.stack) + len(axes.inputs)
    return shape[:stack], math.prod(shape[stack:inputs]), math.prod(shape[inputs:])


def merge_adapters(params: Params) -> Params:
    """Return the parameters with every adapter added to its matrix, ``W + A B · scale``, and no adapter left."""
    base, adapters = split_adapters(params)
    flat, parts = flatten_dict(base, sep="/"), flatten_dict(adapters, sep="/")
    for place in TARGETS.values():
        if f"{place}{ADAPTER}/lora_a" not in parts:
            continue
        a, b, scale = (jnp.asarray(parts[f"{place}{ADAPTER}/{name}"], jnp.float32) for name in (*TRAINED, "lora_scale"))
        kernel = flat[f"{place}/kernel"]
        with jax.default_matmul_precision("highest"):
            change = (a @ b * scale[..., None, None]).reshape(kernel.shape)
        flat[f"{place}/kernel"] = (jnp.asarray(kernel, jnp.float32) + change).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")


def split_adapters(params: Params) -> tuple[Params, Params]:
    """Return the parameters without their adapters, and the adapters alone."""
    flat = flatten_dict(params, sep="/")
    adapters = {path: leaf for path, leaf in flat.items() if f"{ADAPTER}/" in path}
    base = {path: leaf for path, leaf in flat.items() if path not in adapters}
    return unflatten_dict(base, sep="/"), unflatten_dict(adapters, sep="/")


def add_adapters(params: Params, adapters: Params) -> Params:
    """Return the parameters with adapters next to their matrices, for a model to run or to be merged.

    Raises:
        InputError: adapters made for a model of another shape.
    """
    flat, parts = flatten_dict(params, sep="/"), flatten_dict(adapters, sep="/")
    for target, place in TARGETS.items():
        if f"{place}{ADAPTER}/lora_a" not in parts:
            continue
        if f"{place}/kernel" not in flat:
            raise InputError(f"the adapter of {target} has no matrix {place}/kernel; expected the model it is for")
        a, b = (parts[f"{place}{ADAPTER}/{name}"].shape for name in TRAINED)
        found = (a[:-2], a[-2], b[-1])
        expected = _matrix_shape(target, flat[f"{place}/kernel"].shape)
        if found != expected or a[:-2] != b[:-2] or a[-1] != b[-2]:
            found, expected = ((*stack, n_in, n_out) for stack, n_in, n_out in (found, expected))
            problem = f"the adapter of {target} is for a matrix {found}, and the model's is {expected}"
            raise InputError(f"{problem}; expected the model that it was trained on")
    return unflatten_dict({**flat, **parts}, sep="/")
