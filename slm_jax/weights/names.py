"""Where each foreign tensor belongs in the params tree: what a format's name map is made of."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from slm_jax.model import GPTConfig, param_shapes
from slm_jax.nn.axes import STACK, find_axes


@dataclasses.dataclass(frozen=True, init=False)
class Slot:
    """The leaves of the params tree that one foreign tensor fills.

    Attributes:
        paths: usually one leaf, such as ``blocks/ff/fc/kernel``; several where the format has them in one tensor, side
            by side along the outputs.
        layer: index into the leaves' first axis; None: they are not stacked.
        transpose: whether the foreign tensor is (out, in), as PyTorch's ``Linear`` has it, where ours is (in, out).
    """

    paths: tuple[str, ...]
    layer: int | None = None
    transpose: bool = False

    def __init__(self, *paths: str, layer: int | None = None, transpose: bool = False):
        for field, value in (("paths", paths), ("layer", layer), ("transpose", transpose)):
            object.__setattr__(self, field, value)

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the foreign tensor's shape, given those of all leaves."""
        views = self._views({path: np.broadcast_to(np.float32(0), shapes[path]) for path in self.paths})
        shape = list(views[0].shape)
        shape[self._axis(views)] = sum(view.shape[self._axis(views)] for view in views)
        return tuple(shape)

    def read(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the foreign tensor that the leaves make; a copy only if it is transposed or made of several."""
        views = self._views(leaves)
        return np.ascontiguousarray(views[0] if len(views) == 1 else np.concatenate(views, self._axis(views)))

    def write(self, leaves: Mapping[str, np.ndarray], start: int, rows: np.ndarray) -> None:
        """Write rows of the foreign tensor, from row ``start`` on, to their places in the leaves."""
        views = self._views(leaves)
        ends = np.cumsum([view.shape[self._axis(views)] for view in views])
        if self._axis(views) > 0:
            for view, part in zip(views, np.split(rows, ends[:-1], axis=1), strict=True):
                view[start : start + len(rows)] = part
            return
        for view, end in zip(views, ends, strict=True):
            first = end - len(view)
            low, high = max(start, first), min(start + len(rows), end)
            if low < high:
                view[low - first : high - first] = rows[low - start : high - start]

    def _views(self, leaves: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return each leaf's part as a vector or a matrix laid out as in the foreign tensor, without a copy."""
        views = []
        for path in self.paths:
            leaf, axes = leaves[path], find_axes(path)
            assert axes is not None
            if self.layer is not None:
                leaf = leaf[self.layer]
            n_inputs = math.prod(leaf.shape[: len(axes.inputs)])
            leaf = leaf.reshape(n_inputs, -1) if axes.inputs else leaf.reshape(-1)
            views.append(leaf.T if self.transpose else leaf)
        return views

    def _axis(self, views: list[np.ndarray]) -> int:
        """Return the axis of the outputs, along which several leaves lie side by side."""
        return 0 if self.transpose else views[0].ndim - 1


NameMap = dict[str, Slot]


def leaf_shapes(cfg: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf of the params tree by its path."""
    return {path: leaf.shape for path, leaf in flatten_dict(param_shapes(cfg), sep="/").items()}


def largest_first(shapes: Mapping[str, tuple[int, ...]], names: NameMap) -> list[tuple[str, ...]]:
    """Order the leaves, those that share a tensor together: each copy is then small against what is there already."""
    groups = {slot.paths for slot in names.values()}
    return sorted(groups, key=lambda paths: (-sum(math.prod(shapes[path]) for path in paths), paths))


def shape_fields(shapes: Mapping[str, tuple[int, ...]], embedding: str, positions: str, blocks: str) -> dict[str, Any]:
    """Return the GPTConfig fields that the shapes determine.

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
            paths = (f"{STACK}/{path}" for path in slot.paths)
            names[prefix.format(layer) + name] = Slot(*paths, layer=layer, transpose=slot.transpose)
    leaves = leaf_shapes(cfg)
    return {name: slot for name, slot in names.items() if leaves.keys() >= set(slot.paths)}
