"""The named axes of every parameter: the one table from which everything that depends on an architecture is derived.

Sharding, weight decay, Muon's matrices, LoRA targets, counts of parameters and FLOPs, and the memory of a training step
read this table and the sizes of the axes (:func:`slm_jax.model.axis_sizes`); none of them knows a leaf by its name.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Params = dict[str, Any]

HEAD = "out_head/kernel"  # missing where the head is tied to the token embedding
STACK = "blocks"  # the subtree whose leaves have the layer as their first axis
ADAPTER = "_adapter"  # what a LoRA adapter's subtree adds to the name of the matrix that it changes


class Axes(NamedTuple):
    """The named axes of one parameter, in the order of its shape."""

    stack: tuple[str, ...]  # ("layers",) inside the stack of blocks, else empty
    inputs: tuple[str, ...]  # it is multiplied along these, or looked up in them; empty for a bias or a scale
    outputs: tuple[str, ...]  # axes of the result

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each axis of the shape."""
        return (*self.stack, *self.inputs, *self.outputs)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix or an embedding, and neither a bias nor a scale; weight decay applies to these."""
        return bool(self.inputs)

    @property
    def is_table(self) -> bool:
        """Whether it is an embedding: its rows are looked up, not multiplied (but by a head that is tied to it)."""
        return self.inputs in (("vocab",), ("positions",))

    @property
    def is_head(self) -> bool:
        """Whether it belongs to an output head; a tied one is the token embedding, which does not count."""
        return self.outputs in (("vocab",), ("classes",))

    @property
    def is_adapter(self) -> bool:
        """Whether it is one of the two thin matrices of a LoRA adapter."""
        return "rank" in self.names

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Return the parameter's shape, given the size of every axis."""
        return tuple(sizes[name] for name in self.names)


def _axes(text: str) -> Axes:
    """Read ``"embed -> heads head_dim"``; without an arrow there are only outputs."""
    inputs, arrow, outputs = text.rpartition("->")
    return Axes((), tuple(inputs.split()) if arrow else (), tuple(outputs.split()))


_TOP = {
    "tok_emb/embedding": "vocab -> embed",
    "pos_emb/embedding": "positions -> embed",
    "final_norm/scale": "embed",
    "final_norm/bias": "embed",
    "out_head/kernel": "embed -> vocab",
    "class_head/kernel": "embed -> classes",
    "class_head/bias": "classes",
}
_BLOCK = {
    "norm1/scale": "embed",
    "norm1/bias": "embed",
    "attn/q/kernel": "embed -> heads head_dim",
    "attn/q/bias": "heads head_dim",
    "attn/k/kernel": "embed -> kv_heads head_dim",
    "attn/k/bias": "kv_heads head_dim",
    "attn/v/kernel": "embed -> kv_heads head_dim",
    "attn/v/bias": "kv_heads head_dim",
    "attn/q_norm/scale": "head_dim",
    "attn/k_norm/scale": "head_dim",
    "attn/out_proj/kernel": "heads head_dim -> embed",
    "attn/out_proj/bias": "embed",
    "norm2/scale": "embed",
    "norm2/bias": "embed",
    "ff/fc/kernel": "embed -> mlp",
    "ff/fc/bias": "mlp",
    "ff/proj/kernel": "mlp -> embed",
    "ff/proj/bias": "embed",
    "ff/gate/kernel": "embed -> mlp",
    "ff/gate/bias": "mlp",
}
TABLE: dict[str, Axes] = {
    **{f"{STACK}/{path}": _axes(text)._replace(stack=("layers",)) for path, text in _BLOCK.items()},
    **{path: _axes(text) for path, text in _TOP.items()},
}


@functools.cache
def find_axes(path: str) -> Axes | None:
    """Return the axes of the parameter at a path such as ``blocks/attn/q/kernel``; None if there is no such parameter.

    A segment of the stack (``blocks_0/…``) has the axes of the whole one. An adapter's matrices have an axis ``rank``
    between the inputs and the outputs of their matrix, which count as one axis each (the product of their
    sizes); its constants have the stack's axis only. Leading parts of the path are ignored: an optimizer's state holds
    trees of the same leaves.
    """
    path = re.sub(rf"(^|/){STACK}_\d+/", rf"\1{STACK}/", path)
    if f"{ADAPTER}/" in path:
        place, _, leaf = path.rpartition("/")
        matrix = find_axes(f"{place.removesuffix(ADAPTER)}/kernel")
        if matrix is None:
            return None
        inputs, outputs = (("*".join(names),) for names in matrix[1:])
        products = {"lora_a": (inputs, ("rank",)), "lora_b": (("rank",), outputs)}
        return Axes(matrix.stack, *products.get(leaf, ((), ())))
    parts = path.split("/")
    return next((TABLE[name] for i in range(len(parts)) if (name := "/".join(parts[i:])) in TABLE), None)


def map_axes(function: Callable[[Axes | None, Any], Any], tree: Any) -> Any:
    """Apply ``function(axes, leaf)`` to every leaf of a params tree, or of any state that holds such trees."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(find_axes(_join(path)), leaf), tree)


def _join(path: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def count(params: Any, wanted: Callable[[Axes], bool] = lambda axes: True) -> int:
    """Count the parameters of a tree (arrays or shapes) whose axes are ``wanted``."""

    def size(axes: Axes | None, leaf: Any) -> int:
        assert axes is not None, "a leaf that the table does not name"
        return leaf.size if wanted(axes) else 0

    return sum(jax.tree.leaves(map_axes(size, params)))


# What :func:`slm_jax.evaluation.capture.capture` sees before and after the blocks, and in a block (the last is the
# block itself), in the order of computation.
FIRST_POINT, LAST_POINTS = "embeddings", ("final_norm", "logits")
POINTS = (
    *("/norm1", "/attn/q", "/attn/k", "/attn/v", "/attn/weights", "/attn/heads", "/attn"),
    *("/norm2", "/ff/hidden", "/ff", ""),
)
# Those of them that are the input of a matrix, with the matrix and the axis that counts their units.
INPUT_POINTS = {"/attn/heads": ("/attn/out_proj", "heads"), "/ff/hidden": ("/ff/proj", "mlp")}
