"""Where each foreign tensor belongs in the params tree: what a format's name map is made of."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from slm_jax.model import GPTConfig, param_shapes


@dataclasses.dataclass(frozen=True)
class Slot:
    """The part of the params tree that one foreign tensor fills.

    Attributes:
        path: the leaf, such as ``blocks/attn/qkv/kernel``.
        layer: index into the leaf's first axis; None: the leaf is not stacked.
        part: which third of the last axis (0, 1, 2: query, key, value); None: all of it.
        transpose: whether the foreign tensor is (out, in), as PyTorch's ``Linear`` has it, where ours is (in, out).
    """

    path: str
    layer: int | None = None
    part: int | None = None
    transpose: bool = False

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """Return the slot's part of a leaf, laid out as the foreign tensor, without a copy."""
        if self.layer is not None:
            leaf = leaf[self.layer]
        if self.part is not None:
            third = leaf.shape[-1] // 3
            leaf = leaf[..., self.part * third : (self.part + 1) * third]
        return leaf.T if self.transpose else leaf

    def foreign_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the foreign tensor's shape for a leaf of this shape."""
        return self.view(np.broadcast_to(np.float32(0), shape)).shape


NameMap = dict[str, Slot]


def leaf_shapes(cfg: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf of the params tree by its path."""
    return {path: leaf.shape for path, leaf in flatten_dict(param_shapes(cfg), sep="/").items()}


def largest_first(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Order leaves so that the copy made of each is small against what is there already."""
    return sorted(shapes, key=lambda path: -math.prod(shapes[path]))


def shape_fields(shapes: Mapping[str, tuple[int, ...]], embedding: str, positions: str, blocks: str) -> dict[str, Any]:
    """Return the GPTConfig fields that the shapes tell.

    Args:
        shapes: of the tensors, by their cleaned names.
        embedding: name of the token embedding.
        positions: name of the position embedding.
        blocks: what the names in a block start with, in front of its index.
    """
    pattern = re.compile(re.escape(blocks) + r"\.(\d+)\.")
    fields = {"n_layers": len({found[1] for name in shapes if (found := pattern.match(name))})}
    if len(shapes.get(embedding, ())) == 2:
        fields["vocab_size"], fields["emb_dim"] = shapes[embedding]
    if len(shapes.get(positions, ())) == 2:
        fields["context_length"] = shapes[positions][0]
    return fields


def expand(cfg: GPTConfig, top: NameMap, block: NameMap, prefix: str) -> NameMap:
    """Make a model's whole name map from that of its top level and that of one block.

    Args:
        cfg: the model; leaves that it lacks (biases, a head of its own) are left out.
        top: names and slots outside the blocks.
        block: names and slots of a block, both without prefix.
        prefix: of a block's names, with ``{}`` for its index.
    """
    names = dict(top)
    for layer in range(cfg.n_layers):
        for name, slot in block.items():
            names[prefix.format(layer) + name] = dataclasses.replace(slot, path=f"blocks/{slot.path}", layer=layer)
    leaves = leaf_shapes(cfg)
    return {name: slot for name, slot in names.items() if slot.path in leaves}
