"""nanoGPT's ``ckpt.pt``: Hugging Face's names, with weights as PyTorch's ``Linear`` has them, (out, in).

``bias=False`` drops every bias. Source: karpathy/nanoGPT, ``model.py`` and ``train.py``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig
from slm_jax.tokenizer import Tokenizer
from slm_jax.weights.files import OURS, TensorFiles
from slm_jax.weights.huggingface import HuggingFace
from slm_jax.weights.names import HEAD, TOKENS, NameMap, Slot

_FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "bias": "bias",
}


_BLOCK: NameMap = {
    name: Slot(*slot.paths, transpose=name.endswith(".weight") and not name.startswith("ln_"))
    for name, slot in HuggingFace.block.items()
}


class NanoGPT(HuggingFace):
    """Hugging Face's names, other shapes."""

    title = "nanoGPT"
    block = _BLOCK

    def recognise(self, files: TensorFiles) -> bool:
        """Whether these tensors are GPT-2's with weights as (out, in)."""
        return bool(self.is_in_out(files)) and not super().recognise(files)

    def tensor_fields(self, files: TensorFiles) -> dict[str, Any]:
        """Return the fields; there may be no bias at all."""
        return {**super().tensor_fields(files), "bias": any(name.endswith(".bias") for name in files.tensors)}

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        """Return the fields of ``model_args``, without dropout."""
        fields = {field: files.model_args[key] for key, field in _FIELDS.items() if key in files.model_args}
        for field, value in fields.items():
            if not isinstance(value, int):
                raise InputError(f"{files.file}: model_args has a {type(value).__name__} for {field}; expected int")
        # nanoGPT only computes the exact GELU; a file that we wrote states which form the model was trained with.
        return fields if OURS in files.metadata else {**fields, "exact_gelu": True}

    def fit(self, cfg: GPTConfig) -> GPTConfig:
        """Add biases of query, key and value if the others are there."""
        if not cfg.tie_weights:
            raise InputError("nanoGPT has no untied output head, which this model has; expected format huggingface")
        return dataclasses.replace(cfg, qkv_bias=True) if cfg.bias else cfg

    def written_names(self, cfg: GPTConfig) -> NameMap:
        """Add the tied matrix a second time, as in nanoGPT's state dict."""
        return {**super().written_names(cfg), self.name_of(HEAD): Slot(TOKENS)}

    def side_files(
        self, cfg: GPTConfig, dtype: str, tokenizer: Tokenizer | None, card: Mapping[str, Any]
    ) -> dict[str, bytes]:
        """Return nothing."""
        return {}


FORMAT = NanoGPT()
