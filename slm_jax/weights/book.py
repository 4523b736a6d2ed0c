"""The book's ``GPTModel``: query, key and value in separate tensors, an output head of its own, weights as (out, in).

Source: rasbt/LLMs-from-scratch, chapter 4 (``GPTModel``) and chapter 5 (how it is saved).
"""

import dataclasses
import re
from typing import Any

from slm_jax.model import GPTConfig
from slm_jax.weights.files import TensorFiles
from slm_jax.weights.names import HEAD, POSITIONS, TOKENS, Format, NameMap, Slot

_TOP: NameMap = {
    "tok_emb.weight": Slot(TOKENS),
    "pos_emb.weight": Slot(POSITIONS),
    "final_norm.scale": Slot("final_norm/scale"),
    "final_norm.shift": Slot("final_norm/bias"),
    "out_head.weight": Slot(HEAD, transpose=True),
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


class Book(Format):
    """The book's names."""

    title = "the book"
    top = _TOP
    prefix = "trf_blocks.{}."
    block = _BLOCK

    def clean(self, name: str) -> str | None:
        """Leave out the causal mask."""
        return None if re.fullmatch(r"trf_blocks\.\d+\.att\.mask", name) else name

    def recognise(self, files: TensorFiles) -> bool:
        """Whether these tensors have the book's names."""
        return any(name.startswith("trf_blocks.") for name in files.tensors)

    def tensor_fields(self, files: TensorFiles) -> dict[str, Any]:
        """Return the fields; biases of query, key and value are optional."""
        qkv_bias = "trf_blocks.0.att.W_query.bias" in files.tensors
        return {**super().tensor_fields(files), "bias": True, "qkv_bias": qkv_bias, "tie_weights": False}

    def fit(self, cfg: GPTConfig) -> GPTConfig:
        """Add the other biases and an untied head."""
        return dataclasses.replace(cfg, bias=True, qkv_bias=cfg.qkv_bias and cfg.bias, tie_weights=False)


FORMAT = Book()
