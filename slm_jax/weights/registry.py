"""The supported formats of weights, and the families of models that are only recognised.

A format is a module of its name in this package, with its ``FORMAT``; Hugging Face's is one for each family of models.
"""

import importlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

from slm_jax.errors import InputError

if TYPE_CHECKING:
    from slm_jax.model import GPTConfig
    from slm_jax.weights.names import Format

FormatName = Literal["huggingface", "nanogpt", "book", "gguf"]  # that we also write
GGUFDtype = Literal["float32", "float16", "q8_0"]  # of the matrices in a GGUF file that we write
_READ_ONLY = ("flax_msgpack", "openai", "llmc")
_FAMILIES = {"huggingface": ("gpt2", "llama", "qwen3")}  # modules, in the order in which they are tried

# The first pattern that a tensor's name starts with decides.
_OTHER_FAMILIES = (
    (r"base_model\.model\.|.*\.lora_[AB]\.", "a LoRA adapter (PEFT) without its base model"),
    (r"(transformer|model)\.(h|layers)\.\d+\.(attn\.(attn|qkv|proj)\.|norm_[12]\.|mlp\.fc)", "LitGPT"),
    (r"gpt_neox\.|layers\.\d+\.attention\.query_key_value\.", "GPT-NeoX (Pythia)"),
    (r"(transformer\.)?h\.\d+\.attn\.attention\.", "GPT-Neo"),
    (r"(transformer\.)?h\.\d+\.attn\.[qkv]_proj\.", "GPT-J"),
    (r"(model\.)?decoder\.layers\.\d+\.self_attn\.|model\.decoder\.", "OPT"),
    (r"(model\.)?(language_model\.)?layers\.\d+\.self_attn\.", "a relative of Llama (Mistral, Gemma)"),
    (r"((bert|roberta|electra|deberta)\.)?(embeddings\.word_embeddings|encoder\.layer)\.", "an encoder (BERT-like)"),
)


def formats(name: str | None = None) -> list["Format"]:
    """Return what a format's name stands for, one for each family of models; without a name, all formats."""
    names = (*get_args(FormatName), *_READ_ONLY) if name is None else (name,)
    modules = [module for name in names for module in _FAMILIES.get(name, (name,))]
    imported = [importlib.import_module(f"slm_jax.weights.{module}") for module in modules]
    return [form for module in imported for form in getattr(module, "FORMATS", None) or (module.FORMAT,)]


def find_format(name: str, cfg: "GPTConfig") -> "Format":
    """Return the format of this name that can hold a model.

    Raises:
        InputError: no such format, or one that has no family with the model's architecture.
    """
    if name not in get_args(FormatName):
        raise InputError(f"format is {name!r}; expected one of {', '.join(get_args(FormatName))}")
    problems = []
    for form in formats(name):
        if not (wrong := form.mismatches(cfg)):
            return form
        problems.append(f"{form.title} needs {', '.join(wrong)}")
    raise InputError(f"format {name} has no family for this model: {'; '.join(problems)}")


def describe(names: Iterable[str], model_type: object = None) -> str:
    """Say whose tensors these are: by ``model_type`` of a ``config.json``, and by the pattern of their names."""
    names = list(names)
    known = {form.model_type for form in formats()}
    stated = "" if model_type in (None, *known) else f"model_type {model_type!r} in config.json"
    for pattern, family in _OTHER_FAMILIES:
        for name in names:
            if re.match(rf"(_orig_mod\.|module\.)*({pattern})", name):
                return f"{family}: {f'{stated}, ' if stated else ''}tensor {name}"
    if stated:
        return stated
    return f"no model that slm_jax knows: tensor {names[0]}" if names else "no tensors at all"
