"""Which parameters are trained: two disjoint trees, ``trainable`` and ``frozen``, that merge into the model's.

A frozen trunk is a separate segment (``blocks_0``), so that no gradient is computed through it; frozen leaves have
no optimizer state. :func:`whole_params` restores the model's one tree.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from slm_jax.errors import InputError
from slm_jax.nn.axes import ADAPTER, STACK, Axes, Params, find_axes
from slm_jax.nn.blocks import join_blocks, merge_params, segment_lengths, split_blocks
from slm_jax.nn.lora import init_adapters, merge_adapters

if TYPE_CHECKING:  # loading weights needs no command line
    from slm_jax.training.config import BaseRunConfig


def split_params(params: Params, config: "BaseRunConfig", key: jax.Array) -> tuple[Params, Params]:
    """Split a model's whole params tree according to ``config.trainable``; return (trainable, frozen).

    With ``lora``, adapters are added, initialized with ``key``.
    """
    if config.trainable == "all":
        return params, {}
    if config.trainable == "lora":  # trained: the adapters, and a new classification head without any
        lora = config.lora
        adapters = init_adapters(key, params, lora.targets, rank=lora.rank, alpha=lora.alpha, drop_rate=lora.drop_rate)
        bare = {path for path in params if path + ADAPTER not in adapters}

        def is_trained(path: str) -> bool:
            return _axes(path).is_adapter or ("classes" in _axes(path).names and path.partition("/")[0] in bare)

        return _split(merge_params(params, adapters), is_trained)
    if config.trainable == "head":
        heads = {path.partition("/")[0] for path in flatten_dict(params, sep="/") if _axes(path).is_head}
        if not heads:
            reason = "the model's output head is its token embedding (tie_weights)"
            raise InputError(f"trainable is head, but {reason}; expected last_block, last_n_blocks, all or lora")
        return _split(params, lambda path: path.partition("/")[0] in heads)
    n_layers = segment_lengths(params)[STACK]
    n_blocks = 1 if config.trainable == "last_block" else config.trainable_blocks
    if n_blocks > n_layers:
        raise InputError(f"trainable_blocks is {n_blocks}, and the model has {n_layers} blocks; expected at most that")
    if n_blocks < n_layers:
        params = split_blocks(params, n_layers - n_blocks)
    # Everything after the frozen blocks: the other blocks, the final norm, and the heads.
    return _split(params, lambda path: not path.startswith(f"{STACK}_0/") and not _axes(path).is_table)


def _axes(path: str) -> Axes:
    axes = find_axes(path)
    assert axes is not None, path
    return axes


def _split(params: Params, is_trained: Callable[[str], bool]) -> tuple[Params, Params]:
    flat = flatten_dict(params, sep="/")
    trained = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def whole_params(trainable: Params, frozen: Params) -> Params:
    """Return the model's one tree: trainable and frozen merged, blocks in one stack, adapters added to matrices."""
    params = merge_params(frozen, trainable)
    return merge_adapters(join_blocks(params))


def leaf_table(params: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return every leaf's shape and dtype by its path, JSON-able."""
    return {path: [*leaf.shape, str(leaf.dtype)] for path, leaf in flatten_dict(params, sep="/").items()}


def from_leaf_table(table: Mapping[str, list[Any]]) -> Params:
    """Return the tree of shapes that a :func:`leaf_table` describes."""
    shapes = {path: jax.ShapeDtypeStruct(tuple(shape), dtype) for path, (*shape, dtype) in table.items()}
    return unflatten_dict(shapes, sep="/")
