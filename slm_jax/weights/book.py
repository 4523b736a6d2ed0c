"""The book's ``GPTModel``: query, key and value in separate tensors, an output head of its own, weights as (out, in).

Source: rasbt/LLMs-from-scratch, chapter 4 (``GPTModel``) and chapter 5 (how it is saved).
"""

import re
from typing import Any

from slm_jax.model import GPTConfig
from slm_jax.weights.files import TensorFiles
from slm_jax.weights.names import NameMap, Slot, expand, shape_fields

NAME = "the book"
EMBEDDING = "tok_emb.weight"
POSITIONS = "pos_emb.weight"
HEAD = "out_head.weight"
_TOP: NameMap = {
    EMBEDDING: Slot("tok_emb/embedding"),
    POSITIONS: Slot("pos_emb/embedding"),
    "final_norm.scale": Slot("final_norm/scale"),
    "final_norm.shift": Slot("final_norm/bias"),
    HEAD: Slot("out_head/kernel", transpose=True),
}
_BLOCK: NameMap = {
    "att.W_query.weight": Slot("attn/q/kernel", transpose=True),
    "att.W_key.weight": Slot("attn/k/kernel", transpose=True),
    "att.W_value.weight": Slot("attn/v/kernel", transpose=True),
    "att.W_query.bias": Slot("attn/q/bias"),
    "att.W_key.bias": Slot("attn/k/bias"),
    "att.W_value.bias": Slot("attn/v/bias"),
    "att.out_proj.weight": Slot("attn/out_proj/kernel", transpose=True),
    "att.out_proj.bias": Slot("attn/out_proj/bias"),
    "ff.layers.0.weight": Slot("ff/fc/kernel", transpose=True),
    "ff.layers.0.bias": Slot("ff/fc/bias"),
    "ff.layers.2.weight": Slot("ff/proj/kernel", transpose=True),
    "ff.layers.2.bias": Slot("ff/proj/bias"),
    "norm1.scale": Slot("norm1/scale"),
    "norm1.shift": Slot("norm1/bias"),
    "norm2.scale": Slot("norm2/scale"),
    "norm2.shift": Slot("norm2/bias"),
}


def clean(name: str) -> str | None:
    """Return a tensor's name as the map has it; None for a buffer that is no weight."""
    return None if re.fullmatch(r"trf_blocks\.\d+\.att\.mask", name) else name


def recognise(files: TensorFiles) -> bool:
    """Whether these tensors have the book's names."""
    return any(name.startswith("trf_blocks.") for name in files.tensors)


def shapes(files: TensorFiles) -> dict[str, Any]:
    """Return the GPTConfig fields that the shapes tell: all but the number of heads."""
    fields = shape_fields(files.shapes, EMBEDDING, POSITIONS, "trf_blocks")
    return {**fields, "bias": True, "qkv_bias": "trf_blocks.0.att.W_query.bias" in files.tensors, "tie_weights": False}


def stated(files: TensorFiles) -> dict[str, Any]:
    """Return nothing: the book's files state nothing."""
    return {}


def names(cfg: GPTConfig) -> NameMap:
    """Return the name map of a model."""
    return expand(cfg, _TOP, _BLOCK, "trf_blocks.{}.")
