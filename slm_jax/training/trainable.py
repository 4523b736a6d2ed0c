"""Which parameters are trained: two disjoint trees, ``trainable`` and ``frozen``, that merge into the model's.

A frozen trunk is a segment of its own (``blocks_0``), so that no gradient is computed through it; frozen leaves have
no optimizer state. The forms that training uses lead back to the one tree of the contract: :func:`whole_params`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from slm_jax.errors import InputError
from slm_jax.model import Params, join_blocks, split_blocks
from slm_jax.nn.lora import TRAINED, init_adapters, merge_adapters

if TYPE_CHECKING:  # who loads weights needs no command line
    from slm_jax.training.config import BaseRunConfig, LoRAConfig

HEADS = ("class_head", "out_head")


def split_params(params: Params, config: "BaseRunConfig", key: jax.Array) -> tuple[Params, Params]:
    """Split a model's whole params tree as ``trainable`` says; return (trainable, frozen).

    Args:
        params: the model's; for ``lora`` adapters are added to them.
        config: the run's.
        key: of new adapters.

    Raises:
        InputError: more blocks than the model has; no head of its own; a LoRA pattern that matches nothing.
    """
    heads = {name for name in HEADS if name in params}
    if config.trainable == "all":
        return params, {}
    if config.trainable == "lora":
        return _split_lora(params, config.lora, key)
    if config.trainable == "head":
        if not heads:
            raise InputError(
                "trainable is head, but the model's output head is its token embedding (tie_weights); "
                "expected last_block, last_n_blocks, all or lora"
            )
        return _split_names(params, heads)
    n_layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    n_blocks = 1 if config.trainable == "last_block" else config.trainable_blocks
    if n_blocks > n_layers:
        raise InputError(f"trainable_blocks is {n_blocks}, and the model has {n_layers} blocks; expected at most that")
    if n_blocks == n_layers:
        return _split_names(params, {"blocks", "final_norm", *heads})
    return _split_names(split_blocks(params, n_layers - n_blocks), {"blocks_1", "final_norm", *heads})


def _split_names(params: Params, trained: set[str]) -> tuple[Params, Params]:
    trainable = {name: tree for name, tree in params.items() if name in trained}
    return trainable, {name: tree for name, tree in params.items() if name not in trained}


def _split_lora(params: Params, config: "LoRAConfig", key: jax.Array) -> tuple[Params, Params]:
    """Freeze everything but the adapters, and but a new classification head that has none."""
    adapters = init_adapters(
        key, params, config.targets, rank=config.rank, alpha=config.alpha, drop_rate=config.drop_rate
    )
    trains_head = "class_head_adapter" not in adapters
    flat = flatten_dict(merge_params(params, adapters), sep="/")
    trained = {
        path: leaf
        for path, leaf in flat.items()
        if path.endswith(TRAINED) or (trains_head and path.startswith("class_head/"))
    }
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def merge_params(*trees: Params) -> Params:
    """Merge disjoint trees into one."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat.update(flatten_dict(tree, sep="/"))
    return unflatten_dict(flat, sep="/")


def whole_params(trainable: Params, frozen: Params) -> Params:
    """Return the model's one tree: trainable and frozen merged, blocks in one stack, adapters added to matrices."""
    params = merge_params(frozen, trainable)
    return merge_adapters(params if "blocks" in params else join_blocks(params))


def leaf_table(params: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return every leaf's shape and dtype by its path, JSON-able."""
    return {path: [*leaf.shape, str(leaf.dtype)] for path, leaf in flatten_dict(params, sep="/").items()}


def from_leaf_table(table: Mapping[str, list[Any]]) -> Params:
    """Return the tree of shapes that :func:`leaf_table` described."""
    shapes = {path: jax.ShapeDtypeStruct(tuple(shape), dtype) for path, (*shape, dtype) in table.items()}
    return unflatten_dict(shapes, sep="/")
