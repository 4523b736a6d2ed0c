"""Name maps: where each tensor of a format belongs in the params tree, and what every format has around its map."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from slm_jax.model import GPTConfig, param_shapes
from slm_jax.nn.axes import HEAD, STACK, find_axes
from slm_jax.weights.side_files import About
from slm_jax.weights.tensor_files import TensorFiles

TOKENS, POSITIONS = "tok_emb/embedding", "pos_emb/embedding"


class Slot(NamedTuple):
    """The leaves of the params tree that one foreign tensor fills: several if they lie side by side in its outputs."""

    paths: tuple[str, ...]  # such as blocks/ff/fc/kernel
    layer: int | None = None  # index into the leaves' first axis; None: they are not stacked
    out_in: bool = False  # whether the foreign matrix is (out, in), as in PyTorch's Linear; ours is (in, out)

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the foreign tensor's shape, given those of all leaves."""
        views = self._views({path: np.broadcast_to(np.float32(0), shapes[path]) for path in self.paths})
        axis = self._axis(views)
        n_outputs = sum(view.shape[axis] for view in views)
        return (*views[0].shape[:axis], n_outputs, *views[0].shape[axis + 1 :])

    def read(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the foreign tensor made of the leaves; a copy only if it is transposed or made of several."""
        views = self._views(leaves)
        return np.ascontiguousarray(views[0] if len(views) == 1 else np.concatenate(views, self._axis(views)))

    def write(self, leaves: Mapping[str, np.ndarray], start: int, rows: np.ndarray) -> None:
        """Write the foreign tensor to the leaves; of one that fills a single leaf, only some rows from ``start`` on."""
        views = self._views(leaves)
        axis = self._axis(views)
        ends = np.cumsum([view.shape[axis] for view in views])
        for view, part in zip(views, np.split(rows, ends[:-1], axis), strict=True):
            view[start : start + len(part)] = part

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
            views.append(leaf.T if self.out_in else leaf)
        return views

    def _axis(self, views: list[np.ndarray]) -> int:
        """Return the axis of the outputs, along which several leaves lie side by side."""
        return 0 if self.out_in else views[0].ndim - 1


def leaf_shapes(cfg: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf of the params tree by its path."""
    return {path: leaf.shape for path, leaf in flatten_dict(param_shapes(cfg), sep="/").items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A format of weights: its module declares the maps, and overrides the methods in which the format differs."""

    title: str  # in messages
    top: dict[str, str]  # leaves outside the blocks by their names in the format
    block: dict[str, str]  # leaves of a block by their names without prefix; spaces separate several in one tensor
    prefix: str  # of a block's names, with {} for its index
    front: str = ""  # prefix that all names but the output head's may have, and do have in the files that we write
    buffers: str = ""  # regular expression of names of buffers, such as a mask
    out_in: bool = True  # whether a block's matrices are (out, in), as in PyTorch's Linear
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)  # GPTConfig fields that are always the same

    def clean(self, name: str) -> str | None:
        """Return a tensor's name as in the map, whatever PyTorch or TensorFlow added to it; None for a buffer."""
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", name).removeprefix(self.front)
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        return None if re.fullmatch(self.buffers, name) else name

    def recognise(self, files: TensorFiles) -> bool:
        """Whether these tensors, their names cleaned, are of this format."""
        return any(name.startswith(self.prefix.partition("{")[0]) for name in files.tensors)

    def tensor_fields(self, files: TensorFiles) -> dict[str, Any]:
        """Return the GPTConfig fields that follow from the tensors: all but the number of heads."""
        pattern = re.compile(re.escape(self.prefix).replace(r"\{\}", r"(\d+)"))
        leaves = [path for name, path in self.block.items() if self.prefix.format(0) + name in files.tensors]
        fields: dict[str, Any] = {
            "n_layers": len({found[1] for name in files.tensors if (found := pattern.match(name))}),
            "bias": any(path.endswith("/bias") for path in leaves),
            "qkv_bias": "attn/q/bias" in leaves,
            **self.fixed,
        }
        for leaf, names in ((TOKENS, ("vocab_size", "emb_dim")), (POSITIONS, ("context_length",))):
            tensor = files.tensors.get(self.name_of(leaf))
            if tensor is not None and len(tensor.shape) == 2:
                fields |= dict(zip(names, tensor.shape, strict=False))
        return fields

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        """Return the GPTConfig fields that are stated beside the tensors."""
        return {}

    def names(self, cfg: GPTConfig) -> dict[str, Slot]:
        """Return a model's whole name map; leaves that the model lacks (biases, an untied head) are left out."""
        names = {name: Slot((path,), out_in=path == HEAD) for name, path in self.top.items()}
        for layer in range(cfg.n_layers):
            for name, paths in self.block.items():
                stacked = tuple(f"{STACK}/{path}" for path in paths.split())
                names[self.prefix.format(layer) + name] = Slot(stacked, layer, self.out_in)
        leaves = leaf_shapes(cfg)
        return {name: slot for name, slot in names.items() if leaves.keys() >= set(slot.paths)}

    def name_of(self, leaf: str) -> str:
        """Return the name of a leaf outside the blocks."""
        return next(name for name, path in self.top.items() if path == leaf)

    def written_names(self, cfg: GPTConfig) -> dict[str, Slot]:
        """Return the name map of a file that we write."""
        head = self.name_of(HEAD)
        return {name if name == head else self.front + name: slot for name, slot in self.names(cfg).items()}

    def side_files(self, cfg: GPTConfig, dtype: str, about: About) -> dict[str, bytes]:
        """Return the files beside the weights by name."""
        return {}
