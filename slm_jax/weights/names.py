"""Name maps: where each tensor of a format belongs in the params tree, and what every format has around its map."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, axis_sizes, param_shapes
from slm_jax.nn.axes import HEAD, STACK, find_axes
from slm_jax.weights.side_files import About
from slm_jax.weights.tensor_files import OURS, OURS_FIELDS, TensorFiles
from slm_jax.weights.trees import write_tensors

TOKENS, POSITIONS = "tok_emb/embedding", "pos_emb/embedding"
NORM_BIAS = "final_norm/bias"
CLASSES, CLASS_BIAS = "class_head/kernel", "class_head/bias"  # in place of the output head of a language model


class Slot(NamedTuple):
    """The leaves of the params tree that one foreign tensor fills: several if they lie side by side in its outputs."""

    paths: tuple[str, ...]  # such as blocks/ff/fc/kernel
    layer: int | None = None  # index into the leaves' first axis; None: they are not stacked
    out_in: bool = False  # whether the foreign matrix is (out, in), as in PyTorch's Linear; ours is (in, out)
    interleaved: bool = False  # whether the pairs that RoPE rotates are neighbours, (2i, 2i + 1), in each head

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the foreign tensor's shape, given those of all leaves."""
        views = self._views({path: np.broadcast_to(np.float32(0), shapes[path]) for path in self.paths})
        axis = self._axis(views)
        n_outputs = sum(view.shape[axis] for view in views)
        return (*views[0].shape[:axis], n_outputs, *views[0].shape[axis + 1 :])

    def read(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the foreign tensor made of the leaves; a copy only if it is transposed or made of several."""
        views = self._views(leaves)
        if self.interleaved:
            return np.ascontiguousarray(views[0][self._order(leaves)])
        return np.ascontiguousarray(views[0] if len(views) == 1 else np.concatenate(views, self._axis(views)))

    def write(self, leaves: Mapping[str, np.ndarray], start: int, rows: np.ndarray) -> None:
        """Write the foreign tensor to the leaves; of one that fills a single leaf, only some rows from ``start`` on."""
        views = self._views(leaves)
        if self.interleaved:
            views[0][self._order(leaves)[start : start + len(rows)]] = rows
            return
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

    def _order(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return which of our outputs each row of an interleaved tensor is; our pairs are (i, i + head_dim / 2)."""
        n_heads, head_dim = leaves[self.paths[0]].shape[-2:]
        return np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)

    def _axis(self, views: list[np.ndarray]) -> int:
        """Return the axis of the outputs, along which several leaves lie side by side."""
        return 0 if self.out_in else views[0].ndim - 1


def leaf_shapes(cfg: GPTConfig, n_classes: int = 0) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf by its path: of a language model, or of a classifier without its head's bias."""
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(cfg), sep="/").items()}
    if n_classes:
        shapes = {path: shape for path, shape in shapes.items() if path != HEAD} | {CLASSES: (cfg.emb_dim, n_classes)}
    return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A format of one family's weights: its module declares the maps, and overrides the methods that differ."""

    title: str  # in messages
    model_type: str = "gpt2"  # of a config.json beside the weights
    needs: dict[str, Any] = dataclasses.field(default_factory=dict)  # GPTConfig fields that make the family
    top: dict[str, str]  # leaves outside the blocks by their names in the format
    block: dict[str, str]  # leaves of a block by their names without prefix; spaces separate several in one tensor
    prefix: str  # of a block's names, with {} for its index
    front: str = ""  # prefix that all names but the output head's may have, and do have in the files that we write
    buffers: str = ""  # regular expression of names of buffers, such as a mask
    out_in: bool = True  # whether a block's matrices are (out, in), as in PyTorch's Linear
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)  # GPTConfig fields that are always the same
    class_head: str = ""  # name of a classifier's head, which has no bias; empty: the format has no classifiers

    def mismatches(self, cfg: GPTConfig) -> list[str]:
        """Return the fields, with the values that the family needs, in which a model is of another one."""
        return [f"{field} {_shown(value)}" for field, value in self.needs.items() if not _is_same(cfg, field, value)]

    def clean(self, name: str) -> str | None:
        """Return a tensor's name as in the map, whatever PyTorch or TensorFlow added to it; None for a buffer."""
        name = re.sub(r"^(module\.)+", "", re.sub(r"(?<![^.])_orig_mod\.", "", name)).removeprefix(self.front)
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
            **self.needs,
            **self.fixed,
        }
        for leaf, names in ((TOKENS, ("vocab_size", "emb_dim")), (POSITIONS, ("context_length",))):
            tensor = files.tensors.get(self.name_of(leaf)) if leaf in self.top.values() else None
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

    def read_names(self, cfg: GPTConfig, files: TensorFiles) -> dict[str, Slot]:
        """Return the name map of these files; a leaf that none of their tensors fills is zero."""
        return self.names(cfg)

    def name_of(self, leaf: str) -> str:
        """Return the name of a leaf outside the blocks."""
        return next(name for name, path in self.top.items() if path == leaf)

    def completed(self, cfg: GPTConfig) -> GPTConfig:
        """Return the configuration with everything that the format cannot leave out."""
        return dataclasses.replace(cfg, **{"qkv_bias": cfg.qkv_bias and cfg.bias, **self.fixed})

    def written_names(self, cfg: GPTConfig) -> dict[str, Slot]:
        """Return the name map of a file that we write."""
        head = self.name_of(HEAD)
        return {name if name == head else self.front + name: slot for name, slot in self.names(cfg).items()}

    def classifier_names(self, cfg: GPTConfig) -> dict[str, Slot]:
        """Return the name map of a classifier that we write: its head is in place of the output head."""
        if not self.class_head:
            raise InputError(f"{self.title} has no classifiers; expected format huggingface")
        names = {name: slot for name, slot in self.written_names(cfg).items() if name != self.name_of(HEAD)}
        return {**names, self.class_head: Slot((CLASSES,), out_in=True)}

    def side_files(self, cfg: GPTConfig, dtype: str, about: About) -> dict[str, bytes]:
        """Return the files beside the weights by name."""
        return {}

    def write_weights(self, folder: Path, cfg: GPTConfig, tensors: dict[str, np.ndarray], about: About) -> None:
        """Write the file of the weights."""
        fields = {field: getattr(cfg, field) for field in OURS_FIELDS}
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt", OURS: json.dumps(fields)})


def _is_same(cfg: GPTConfig, field: str, value: Any) -> bool:
    """Whether a model has this value; None stands for the size that follows from the others."""
    if value is not None or getattr(cfg, field) is None:
        return getattr(cfg, field) == value
    default: dict[str, Any] = {field: None}
    try:
        return axis_sizes(dataclasses.replace(cfg, **default)) == axis_sizes(cfg)
    except InputError:  # the heads do not divide the width
        return False


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
