"""Name maps: where each tensor of a format belongs in the params tree, and what every format has around its map."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from flax.traverse_util import flatten_dict

from slm_jax.model import GPTConfig, param_shapes
from slm_jax.nn.axes import STACK, find_axes
from slm_jax.tokenizer import Tokenizer
from slm_jax.weights.files import TensorFiles

TOKENS, POSITIONS, HEAD = "tok_emb/embedding", "pos_emb/embedding", "out_head/kernel"


@dataclasses.dataclass(frozen=True, init=False)
class Slot:
    """The leaves of the params tree that one foreign tensor fills.

    Attributes:
        paths: usually one leaf, such as ``blocks/ff/fc/kernel``; several if the format stores them in one tensor, side
            by side along the outputs.
        layer: index into the leaves' first axis; None: they are not stacked.
        transpose: whether the foreign tensor is (out, in), as in PyTorch's ``Linear``; ours is (in, out).
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
        """Return the foreign tensor made of the leaves; a copy only if it is transposed or made of several."""
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


class Format:
    """A format of weights: its module declares the maps, and overrides the methods in which the format differs.

    Attributes:
        title: name of the format in messages.
        top: names and slots outside the blocks.
        block: names and slots of a block, without prefix.
        prefix: prefix of a block's names, with ``{}`` for its index.
    """

    title: ClassVar[str]
    top: ClassVar[NameMap]
    block: ClassVar[NameMap]
    prefix: ClassVar[str]

    # Reading

    def clean(self, name: str) -> str | None:
        """Return a tensor's name as in the map; None for a buffer, such as a mask."""
        return name

    def recognise(self, files: TensorFiles) -> bool:
        """Whether these tensors, their names cleaned, are of this format."""
        raise NotImplementedError

    def tensor_fields(self, files: TensorFiles) -> dict[str, Any]:
        """Return the GPTConfig fields that follow from the tensors: all but the number of heads."""
        pattern = re.compile(re.escape(self.prefix).replace(r"\{\}", r"(\d+)"))
        fields = {"n_layers": len({found[1] for name in files.tensors if (found := pattern.match(name))})}
        tokens, positions = (files.shapes.get(self.name_of(leaf), ()) for leaf in (TOKENS, POSITIONS))
        if len(tokens) == 2:
            fields["vocab_size"], fields["emb_dim"] = tokens
        if len(positions) == 2:
            fields["context_length"] = positions[0]
        return fields

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        """Return the GPTConfig fields that are stated beside the tensors.

        Raises:
            InputError: a configuration that GPTModel does not support.
        """
        return {}

    def names(self, cfg: GPTConfig) -> NameMap:
        """Return a model's whole name map; leaves that the model lacks (biases, an untied head) are left out."""
        names = dict(self.top)
        for layer in range(cfg.n_layers):
            for name, slot in self.block.items():
                paths = (f"{STACK}/{path}" for path in slot.paths)
                names[self.prefix.format(layer) + name] = Slot(*paths, layer=layer, transpose=slot.transpose)
        leaves = leaf_shapes(cfg)
        return {name: slot for name, slot in names.items() if leaves.keys() >= set(slot.paths)}

    def name_of(self, leaf: str) -> str:
        """Return the name of a leaf outside the blocks."""
        return next(name for name, slot in self.top.items() if slot.paths == (leaf,))

    # Writing

    def fit(self, cfg: GPTConfig) -> GPTConfig:
        """Return the configuration with what the format cannot leave out (biases, an untied head).

        Raises:
            InputError: a model that the format cannot hold.
        """
        return cfg

    def written_names(self, cfg: GPTConfig) -> NameMap:
        """Return the name map of the written file."""
        return self.names(cfg)

    def side_files(
        self, cfg: GPTConfig, dtype: str, tokenizer: Tokenizer | None, card: Mapping[str, Any]
    ) -> dict[str, bytes]:
        """Return the files beside the weights by name."""
        return {}
