"""The tokenizer in the metadata of a GGUF file, rewritten as a `tokenizer.json`. Source: llama.cpp, `llama-vocab`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.errors import InputError, located
from slm_jax.tokenizer.from_scores import NORMAL, UNUSED, added_tokens, bpe_model, with_bos
from slm_jax.tokenizer.gguf_header import read_metadata
from slm_jax.tokenizer.pretrained import PretrainedTokenizer

_PREFIX = "tokenizer.ggml."
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# How Llama 3 and Qwen2 split a text; they differ in how many digits stay together.
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _MODERN.format(digits=digits)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, {**_GPT2, "use_regex": False}]


# The pre-tokenizers of byte-level BPEs by the names that llama.cpp has for them.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}


def read_gguf(file: Path) -> PretrainedTokenizer:
    """Read the tokenizer in a GGUF file, without ids at the end that only pad the vocabulary; errors name the file."""
    metadata = read_metadata(file)
    kinds = np.asarray(metadata.get(f"{_PREFIX}token_type", ()))
    if kinds.size and (used := np.flatnonzero(kinds != UNUSED)).size:
        for key in ("tokens", "token_type", "scores"):
            if (values := metadata.get(f"{_PREFIX}{key}")) is not None:
                metadata[f"{_PREFIX}{key}"] = values[: used[-1] + 1]
    with located(file):
        return from_gguf(metadata)


def from_gguf(metadata: Mapping[str, Any]) -> PretrainedTokenizer:
    """Make a tokenizer from the metadata of a GGUF file.

    Vocabularies of the models `gpt2` (byte-level BPE) and `llama` (pieces with scores) are supported. InputError:
    another one, metadata that are missing or contradict each other.
    """
    about = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    tokens, model = _texts(about, "tokens"), about.get("model")
    kinds = _numbers(about, "token_type", len(tokens), NORMAL)
    if model == "llama":
        scores = _numbers(about, "scores", len(tokens), 0.0)
        content = bpe_model(tokens, scores, kinds, add_space=bool(about.get("add_space_prefix", True)))
        add_bos = True
    elif model == "gpt2":
        content, add_bos = _byte_level(about, tokens, kinds), about.get("pre") == "llama-bpe"
    else:
        raise InputError(f"{_PREFIX}model is {model!r:.60}; expected gpt2 or llama")
    ids = {name: about.get(f"{name}_token_id") for name in (*_ROLES.values(), "eot", "eom")}
    for name, id_ in ids.items():
        if id_ is not None and not (type(id_) is int and 0 <= id_ < len(tokens)):
            raise InputError(f"{_PREFIX}{name}_token_id is {id_!r:.60}; expected an id below {len(tokens)}")
    eos_ids = [id_ for id_ in dict.fromkeys(ids[name] for name in ("eos", "eot", "eom")) if id_ is not None]
    if not eos_ids:
        raise InputError(f"{_PREFIX}eos_token_id is missing; expected the id that ends a text")
    roles = {role: tokens[id_] for role, name in _ROLES.items() if (id_ := ids[name]) is not None}
    add_bos = bool(about.get("add_bos_token", add_bos)) and "bos_token" in roles
    if add_bos:
        content = with_bos(content, roles["bos_token"], about["bos_token_id"])
    template = metadata.get("tokenizer.chat_template")
    return PretrainedTokenizer(content, roles, eos_ids, add_bos, template if isinstance(template, str) else None)


def _byte_level(about: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    pre = about.get("pre", "gpt-2")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise InputError(f"{_PREFIX}pre is {pre!r:.60}; expected one of {', '.join(PRE_TOKENIZERS)}")
    return {
        "version": "1.0",
        "added_tokens": added_tokens(tokens, kinds),
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _GPT2,
        "model": {
            "type": "BPE",
            "vocab": {token: id_ for id_, token in reversed([*enumerate(tokens)])},  # the first of two equal ones
            "merges": _texts(about, "merges"),
            "ignore_merges": pre == "llama-bpe",
        },
    }


def _texts(about: Mapping[str, Any], name: str) -> list[str]:
    found = about.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise InputError(f"{_PREFIX}{name} is {'missing' if found is None else 'damaged'}; expected a list of texts")
    return found


def _numbers(about: Mapping[str, Any], name: str, n: int, default: Any) -> list[Any]:
    """Return a number for each token."""
    found = about.get(name)
    if found is None:
        return [default] * n
    numbers = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(numbers, list) or len(numbers) != n or not all(isinstance(each, int | float) for each in numbers):
        raise InputError(f"{_PREFIX}{name} is damaged; expected {n:,} numbers, one for each token")
    return numbers
