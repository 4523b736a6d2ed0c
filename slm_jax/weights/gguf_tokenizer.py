"""A tokenizer as the metadata of a GGUF file, made of its ``tokenizer.json``.

Byte-level BPE is GGUF's ``gpt2``, which also has a name for how text is split before merging. SentencePiece's BPE is
``llama``, whose scores say the order of the merges. Source: llama.cpp, ``llama-vocab.cpp`` and
``convert_hf_to_gguf.py``.
"""

import json
from collections.abc import Mapping
from typing import Any

from slm_jax.errors import InputError
from slm_jax.tokenizer import Tokenizer
from slm_jax.tokenizer.from_gguf import PRE_TOKENIZERS
from slm_jax.tokenizer.from_scores import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from slm_jax.weights.tokenizer_json import tokenizer_json


def tokenizer_metadata(tokenizer: Tokenizer, n_ids: int = 0) -> dict[str, Any]:
    """Return the metadata ``tokenizer.ggml.*`` of a vocabulary with at least ``n_ids`` ids, the last of them unused.

    Raises:
        InputError: a tokenizer that GGUF has no form for, such as one of words or characters.
    """
    about = json.loads(tokenizer_json(tokenizer))
    model, steps = about["model"], _steps(about.get("pre_tokenizer"))
    if model.get("type") != "BPE":
        raise InputError(f"the tokenizer is of the type {model.get('type')}, and GGUF has no form for it; expected BPE")
    tokens, kinds = _tokens(model, about.get("added_tokens", []), n_ids)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    values: dict[str, Any] = {"tokens": tokens, "token_type": kinds, **_special_ids(tokenizer)}
    if steps in _SPLITS:
        values |= {"model": "gpt2", "pre": _SPLITS[steps], "merges": [" ".join(pair) for pair in merges]}
    elif not steps or model.get("byte_fallback"):
        ranks = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(merges)))}
        values |= {"model": "llama", "scores": [ranks.get(token, 0.0) for token in tokens]}
        values["add_space_prefix"] = _prepends_space(about)
    else:
        raise InputError(f"GGUF has no name for how this tokenizer splits text: {', then '.join(steps)}")
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids with a role; the end of a text also begins one if nothing else does."""
    special, roles = tokenizer.special_tokens, tokenizer.roles
    ids: dict[str, Any] = {"bos_token_id": tokenizer.eot_id, "add_bos_token": bool(tokenizer.start_ids)}
    for name, role in (("bos", "bos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        if roles.get(role) in special:
            ids[f"{name}_token_id"] = special[roles[role]]
    ids |= {f"{name}_token_id": id_ for name, id_ in zip(("eos", "eot", "eom"), tokenizer.eos_ids, strict=False)}
    return ids


def _tokens(model: Mapping[str, Any], added: list[dict[str, Any]], n_ids: int) -> tuple[list[str], list[int]]:
    """Return text and type of every id."""
    tokens = {id_: token for token, id_ in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    if model.get("byte_fallback"):
        kinds |= {id_: BYTE for id_, token in tokens.items() if len(token) == 6 and token.startswith("<0x")}
    for token in added:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    unknown = model.get("unk_token")
    kinds |= {id_: UNKNOWN for id_, token in tokens.items() if token == unknown}
    ids = range(max(n_ids, 1 + max(tokens, default=0)))
    return [tokens.get(id_, f"[PAD{id_}]") for id_ in ids], [kinds.get(id_, UNUSED) for id_ in ids]


def _steps(split: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return what a pre-tokenizer does, step by step."""
    if split is None:
        return ()
    kind = split.get("type")
    if kind == "Sequence":
        return tuple(step for part in split["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel":
        return ("gpt2",) if split.get("use_regex", True) else ("bytes",)
    if kind == "Digits" and split.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and split.get("behavior") == "Isolated" and not split.get("invert"):
        return (split["pattern"].get("Regex", ""),)
    return (str(kind),)


def _prepends_space(about: Mapping[str, Any]) -> bool:
    """Return whether a space is put before the text, by the normalizer or the pre-tokenizer."""
    parts = json.dumps([about.get("normalizer"), about.get("pre_tokenizer")])
    return '"Prepend"' in parts or '"prepend_scheme": "first"' in parts or '"prepend_scheme": "always"' in parts


# How text is split before merging, step by step, and llama.cpp's name for it.
_SPLITS = {_steps({"type": "Sequence", "pretokenizers": steps}): name for name, steps in PRE_TOKENIZERS.items()}
