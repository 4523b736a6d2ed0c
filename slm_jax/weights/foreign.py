"""Whose tensors these are, when they are not GPT-2's: for an error that says so."""

import re
from collections.abc import Iterable

# In this order: the first pattern that a tensor's name starts with decides.
_FAMILIES = (
    (r"base_model\.model\.|.*\.lora_[AB]\.", "a LoRA adapter (PEFT) without its base model"),
    (r"(transformer|model)\.(h|layers)\.\d+\.(attn\.(attn|qkv|proj)\.|norm_[12]\.|mlp\.fc)", "LitGPT"),
    (r"gpt_neox\.|layers\.\d+\.attention\.query_key_value\.", "GPT-NeoX (Pythia)"),
    (r"(transformer\.)?h\.\d+\.attn\.attention\.", "GPT-Neo"),
    (r"(transformer\.)?h\.\d+\.attn\.[qkv]_proj\.", "GPT-J"),
    (r"(transformer\.)?h\.\d+\.self_attention\.", "BLOOM or Falcon"),
    (r"(model\.)?decoder\.layers\.\d+\.self_attn\.|model\.decoder\.", "OPT"),
    (r"(model\.)?(language_model\.)?layers\.\d+\.self_attn\.", "LLaMA-like (LLaMA, Mistral, Qwen, Gemma)"),
    (r"layers\.\d+\.attention\.w[qkvo]\.", "LLaMA-like (Meta's own names)"),
    (r"((bert|roberta|electra|deberta)\.)?(embeddings\.word_embeddings|encoder\.layer)\.", "an encoder (BERT-like)"),
    (r"(distilbert\.)?transformer\.layer\.\d+\.", "an encoder (DistilBERT)"),
    (r"shared\.weight|(encoder|decoder)\.block\.", "T5"),
    (r"tokens_embed\.|transformer\.tokens_embed\.", "GPT-1"),
    (r"model/(h\d+|wte|wpe|ln_f)", "OpenAI's TensorFlow checkpoint of GPT-2, which is not read yet"),
)


def describe(names: Iterable[str], model_type: object = None) -> str:
    """Say whose tensors these are: by the pattern of their names, else by ``model_type`` of a ``config.json``."""
    names = list(names)
    for pattern, family in _FAMILIES:
        for name in names:
            if re.match(pattern, name):
                return f"{family}: tensor {name}"
    if model_type not in (None, "gpt2"):
        return f"model_type {model_type!r} in config.json"
    return f"no model that slm_jax knows: tensor {names[0]}" if names else "no tensors at all"
