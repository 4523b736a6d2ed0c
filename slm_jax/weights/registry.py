"""The supported formats of weights, and the families of models that are only recognised.

A format is a module of its name in this package, with its ``FORMAT``.
"""

import importlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from slm_jax.weights.names import Format

FormatName = Literal["huggingface", "nanogpt", "book"]  # that we also write
_READ_ONLY = ("flax_msgpack", "openai", "llmc")

# The first pattern that a tensor's name starts with decides.
_OTHER_FAMILIES = (
    (r"base_model\.model\.|.*\.lora_[AB]\.", "a LoRA adapter (PEFT) without its base model"),
    (r"(transformer|model)\.(h|layers)\.\d+\.(attn\.(attn|qkv|proj)\.|norm_[12]\.|mlp\.fc)", "LitGPT"),
    (r"gpt_neox\.|layers\.\d+\.attention\.query_key_value\.", "GPT-NeoX (Pythia)"),
    (r"(transformer\.)?h\.\d+\.attn\.attention\.", "GPT-Neo"),
    (r"(transformer\.)?h\.\d+\.attn\.[qkv]_proj\.", "GPT-J"),
    (r"(model\.)?decoder\.layers\.\d+\.self_attn\.|model\.decoder\.", "OPT"),
    (r"(model\.)?(language_model\.)?layers\.\d+\.self_attn\.", "LLaMA-like (LLaMA, Mistral, Qwen, Gemma)"),
    (r"((bert|roberta|electra|deberta)\.)?(embeddings\.word_embeddings|encoder\.layer)\.", "an encoder (BERT-like)"),
)


def formats() -> dict[str, "Format"]:
    """Return all formats by name, in the order in which they are tried."""
    names = (*get_args(FormatName), *_READ_ONLY)
    return {name: importlib.import_module(f"slm_jax.weights.{name}").FORMAT for name in names}


def describe(names: Iterable[str], model_type: object = None) -> str:
    """Say whose tensors these are: by the pattern of their names, else by ``model_type`` of a ``config.json``."""
    names = list(names)
    for pattern, family in _OTHER_FAMILIES:
        for name in names:
            if re.match(rf"(_orig_mod\.|module\.)*({pattern})", name):
                return f"{family}: tensor {name}"
    if model_type not in (None, "gpt2"):
        return f"model_type {model_type!r} in config.json"
    return f"no model that slm_jax knows: tensor {names[0]}" if names else "no tensors at all"
