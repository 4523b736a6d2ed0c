"""LoRA: a large change of a matrix as the product of two small ones, trained beside the frozen matrix.

``y = x W + dropout(x) A B · alpha / rank``, with A random and B zero at the start, so that the first step begins with
the very model that is adapted. An adapter is part of the params tree: beside ``blocks/attn/out_proj`` lies
``blocks/attn/out_proj_adapter`` with ``lora_a`` (layers, in, rank), ``lora_b`` (layers, rank, out) and the constants
``lora_scale`` and, with dropout, ``lora_drop_rate``. The model looks whether it is there; its configuration does not
change. Query, key and value have adapters of their own beside their common matrix.

Source: Hu et al. 2021.
"""

import math
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from slm_jax.errors import InputError

Params = dict[str, Any]

SUFFIX = "_adapter"
TRAINED = ("lora_a", "lora_b")

# Each target: the matrix that it changes, and which third of its columns where it is one of query, key and value.
TARGETS: dict[str, tuple[str, int | None]] = {
    "attn/q": ("blocks/attn/qkv/kernel", 0),
    "attn/k": ("blocks/attn/qkv/kernel", 1),
    "attn/v": ("blocks/attn/qkv/kernel", 2),
    "attn/out_proj": ("blocks/attn/out_proj/kernel", None),
    "ff/fc": ("blocks/ff/fc/kernel", None),
    "ff/proj": ("blocks/ff/proj/kernel", None),
    "out_head": ("out_head/kernel", None),
    "class_head": ("class_head/kernel", None),
}


class Adapter(nn.Module):
    """Adds to ``y = x W`` what the params tree holds for this place; without an adapter there, ``y`` stays as it is."""

    @nn.compact
    def __call__(
        self, y: Float[Array, "*out"], x: Float[Array, "*batch features"], deterministic: bool = True
    ) -> Float[Array, "*out"]:
        """Return ``y``, changed; its last axis may be cut in heads."""
        if not self.has_variable("params", "lora_a"):
            return y
        a, b, scale = (jnp.asarray(self.get_variable("params", name)) for name in (*TRAINED, "lora_scale"))
        if self.has_variable("params", "lora_drop_rate") and not deterministic:
            keep = 1 - jnp.asarray(self.get_variable("params", "lora_drop_rate"))
            x = jnp.where(jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape), x / keep.astype(x.dtype), 0)
        change = (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
        return y + (change * scale.astype(x.dtype)).reshape(y.shape).astype(y.dtype)


def find_targets(params: Params, patterns: tuple[str, ...]) -> list[str]:
    """Return the targets that patterns such as ``attn/*`` name, among those that ``params`` (arrays or shapes) has.

    Raises:
        InputError: a pattern that names none.
    """
    flat = flatten_dict(params, sep="/")
    there = [target for target, (path, _) in TARGETS.items() if path in flat]
    for pattern in patterns:
        if not any(fnmatchcase(target, pattern) for target in there):
            raise InputError(f"lora.targets: {pattern!r} matches nothing; expected patterns of {', '.join(there)}")
    return [target for target in there if any(fnmatchcase(target, pattern) for pattern in patterns)]


def init_adapters(
    key: jax.Array, params: Params, targets: tuple[str, ...], *, rank: int, alpha: float, drop_rate: float = 0.0
) -> Params:
    """Make new adapters: A uniform within ±1/√in, B zero, in the matrices' dtype; and their constants.

    Args:
        key: of A.
        params: the model's, arrays or shapes, the blocks in one stack.
        targets: patterns of the matrices that get one (:func:`find_targets`).
        rank: of the change.
        alpha: the change is multiplied by alpha / rank.
        drop_rate: dropout on what goes into an adapter; at 0 there is none.

    Returns:
        The adapters alone; :func:`add_adapters` puts them into a params tree.

    Raises:
        InputError: a pattern that names none.
    """
    flat = flatten_dict(params, sep="/")
    constants = {"lora_scale": alpha / rank, **({"lora_drop_rate": drop_rate} if drop_rate else {})}
    adapters = {}
    for target in find_targets(params, targets):
        path, third = TARGETS[target]
        *stack, n_in, n_out = flat[path].shape
        n_out = n_out if third is None else n_out // 3
        dtype, bound = flat[path].dtype, 1 / math.sqrt(n_in)
        own_key = jax.random.fold_in(key, list(TARGETS).index(target))  # whatever the other targets are
        adapters[_place(target)] = {
            "lora_a": jax.random.uniform(own_key, (*stack, n_in, rank), dtype, -bound, bound),
            "lora_b": jnp.zeros((*stack, rank, n_out), dtype),
            **{name: jnp.full(stack, value, jnp.float32) for name, value in constants.items()},
        }
    return unflatten_dict(adapters, sep="/")


def merge_adapters(params: Params) -> Params:
    """Return the parameters with every adapter added to its matrix, ``W + A B · scale``, and none left."""
    base, adapters = split_adapters(params)
    flat, parts = flatten_dict(base, sep="/"), flatten_dict(adapters, sep="/")
    for target, (path, third) in TARGETS.items():
        place = _place(target)
        if f"{place}/lora_a" not in parts:
            continue
        a, b, scale = (jnp.asarray(parts[f"{place}/{name}"], jnp.float32) for name in (*TRAINED, "lora_scale"))
        with jax.default_matmul_precision("highest"):
            change = a @ b * scale[..., None, None]
        columns = slice((third or 0) * b.shape[-1], (third or 0) * b.shape[-1] + b.shape[-1])
        matrix = jnp.asarray(flat[path], jnp.float32).at[..., columns].add(change)
        flat[path] = matrix.astype(flat[path].dtype)
    return unflatten_dict(flat, sep="/")


def split_adapters(params: Params) -> tuple[Params, Params]:
    """Return the parameters without their adapters, and the adapters alone."""
    flat = flatten_dict(params, sep="/")
    adapters = {path: leaf for path, leaf in flat.items() if f"{SUFFIX}/" in path}
    base = {path: leaf for path, leaf in flat.items() if path not in adapters}
    return unflatten_dict(base, sep="/"), unflatten_dict(adapters, sep="/")


def add_adapters(params: Params, adapters: Params) -> Params:
    """Return the parameters with adapters beside their matrices, for a model to run or to be merged.

    Raises:
        InputError: adapters made for a model of another shape.
    """
    flat, parts = flatten_dict(params, sep="/"), flatten_dict(adapters, sep="/")
    for target, (path, third) in TARGETS.items():
        place = _place(target)
        if f"{place}/lora_a" not in parts:
            continue
        if path not in flat:
            raise InputError(f"the adapter of {target} has no matrix {path} beside it; expected the model it is for")
        a, b = (parts[f"{place}/{name}"].shape for name in TRAINED)
        expected = (*flat[path].shape[:-1], flat[path].shape[-1] // (1 if third is None else 3))
        if (*a[:-1], b[-1]) != expected or a[:-2] != b[:-2] or a[-1] != b[-2]:
            raise InputError(
                f"the adapter of {target} is for a matrix {(*a[:-1], b[-1])}, and the model's is {expected}; "
                "expected the model that it was trained on"
            )
    return unflatten_dict({**flat, **parts}, sep="/")


def _place(target: str) -> str:
    """Return where in the params tree a target's adapter lies."""
    path, third = TARGETS[target]
    parent = path.removesuffix("/kernel")
    if third is not None:
        parent = f"{parent.removesuffix('qkv')}{target[-1]}"
    return f"{parent}{SUFFIX}"
