"""``save_gpt2``: a model as a folder that Hugging Face, nanoGPT or the book's code can read."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from slm_jax.errors import InputError
from slm_jax.files import check_new_folder, new_folder
from slm_jax.model import GPTConfig, Params
from slm_jax.nn.blocks import join_blocks
from slm_jax.nn.lora import merge_adapters
from slm_jax.tokenizer import GPT2Tokenizer, Tokenizer
from slm_jax.weights.files import FLOATS, OURS
from slm_jax.weights.names import NameMap, Slot, leaf_shapes
from slm_jax.weights.reader import FORMATS, OURS_FIELDS
from slm_jax.weights.transformers_folder import folder_files
from slm_jax.weights.trees import write_tensors

FormatName = Literal["huggingface", "nanogpt", "book"]


def save_gpt2(
    cfg: GPTConfig,
    params: Params,
    folder: str | Path,
    *,
    format: FormatName = "huggingface",
    tokenizer: Tokenizer | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model for another program; the folder is there whole, or not at all.

    ``huggingface`` makes a folder that ``transformers`` opens as ``GPT2LMHeadModel``; ``nanogpt`` and ``book`` make one
    ``model.safetensors`` with the names of their state dicts. Tensors keep their dtype. What a format cannot leave
    out is filled in with equal logits: biases that the model lacks become zeros, and for the book, whose output
    head is always its own, a tied one becomes a copy of the token embedding. nanoGPT's code computes the exact GELU
    and the book's the tanh form, whatever the model had: there another form changes logits in the fourth digit.

    Args:
        cfg: the model's configuration.
        params: its parameters; adapters among them are merged with their matrices.
        folder: where to write; must not exist, or be empty.
        format: ``huggingface``, ``nanogpt`` or ``book``.
        tokenizer: its files go into the folder: GPT-2's as ``transformers`` reads it (if tiktoken's files are at
            hand), any other as ``tokenizer/tokenizer.json``, which slm_jax reads.
        card: figures for the model card, such as ``{"validation loss": 3.2}``; only ``huggingface`` has one.

    Returns:
        The folder.

    Raises:
        InputError: a folder in use or not to be written to, parameters that do not fit the configuration or are not
            finite, a model that the format cannot hold.
    """
    if format not in get_args(FormatName):
        raise InputError(f"format is {format!r}; expected one of {', '.join(get_args(FormatName))}")
    if format == "nanogpt" and not cfg.tie_weights:
        raise InputError("nanoGPT has no output head of its own, which this model has; expected format huggingface")
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids; the model's vocab_size is {cfg.vocab_size}")
    target = check_new_folder(folder)
    leaves = _leaves(cfg, params)
    cfg, leaves = _complete(cfg, leaves, format)
    tensors = _tensors(leaves, _names(cfg, format))
    with new_folder(target) as partial:
        if format == "huggingface":
            dtype = str(leaves["tok_emb/embedding"].dtype)
            for name, content in folder_files(cfg, dtype, tokenizer, card).items():
                (partial / name).write_bytes(content)
        if tokenizer is not None and not isinstance(tokenizer, GPT2Tokenizer):
            tokenizer.save(partial / "tokenizer")
        _write(partial / "model.safetensors", tensors, cfg)
    return target


def _leaves(cfg: GPTConfig, params: Params) -> dict[str, np.ndarray]:
    """Bring the parameters to the host, checked against the configuration."""
    if not isinstance(params, Mapping):
        raise InputError(
            f"params is a {type(params).__name__}; expected a model's params tree: save_gpt2(cfg, params, …)"
        )
    if "params" in params or not any(str(name).startswith("blocks") for name in params):
        raise InputError(
            f"params has the entries {', '.join(map(str, params)) or 'none'}; expected a model's params tree: "
            'model.init(...)["params"]'
        )
    for path, leaf in flatten_dict(params, sep="/").items():
        if not isinstance(leaf, jax.Array | np.ndarray) or str(leaf.dtype) not in FLOATS:
            kind = f"{type(leaf).__name__} of {getattr(leaf, 'dtype', 'no dtype')}"
            raise InputError(f"parameter {path} is a {kind}; expected an array of one of {', '.join(FLOATS)}")
    flat = flatten_dict(merge_adapters(params if "blocks" in params else join_blocks(params)), sep="/")
    expected = leaf_shapes(cfg)
    found = {path: leaf.shape for path, leaf in flat.items()}
    if wrong := sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path)):
        raise InputError(
            f"parameter {wrong[0]} has the shape {found.get(wrong[0])}; expected {expected.get(wrong[0])}: "
            "these parameters are of another configuration"
        )
    return {path: np.asarray(leaf) for path, leaf in flat.items()}


def _complete(
    cfg: GPTConfig, leaves: dict[str, np.ndarray], format: FormatName
) -> tuple[GPTConfig, dict[str, np.ndarray]]:
    """Add the leaves that the format cannot leave out."""
    changes: dict[str, Any] = {}
    if format == "huggingface":
        changes = {"bias": True, "qkv_bias": True}
    elif format == "nanogpt" and cfg.bias:
        changes = {"qkv_bias": True}
    elif format == "book":
        changes = {"bias": True, "qkv_bias": cfg.qkv_bias and cfg.bias, "tie_weights": False}
    cfg = dataclasses.replace(cfg, **changes)
    embedding = leaves["tok_emb/embedding"]
    added = {path: shape for path, shape in leaf_shapes(cfg).items() if path not in leaves}
    zeros = {path: np.zeros(shape, embedding.dtype) for path, shape in added.items() if path != "out_head/kernel"}
    head = {"out_head/kernel": embedding.T} if "out_head/kernel" in added else {}
    return cfg, {**leaves, **zeros, **head}


def _names(cfg: GPTConfig, format: FormatName) -> NameMap:
    names = FORMATS[format].names(cfg)
    if format == "book":
        return names
    if format == "nanogpt":  # its state dict has the tied matrix twice
        names[FORMATS[format].HEAD] = Slot("tok_emb/embedding")
    return {name if name == FORMATS[format].HEAD else f"transformer.{name}": slot for name, slot in names.items()}


def _tensors(leaves: Mapping[str, np.ndarray], names: NameMap) -> dict[str, np.ndarray]:
    """Cut the leaves into foreign tensors; only transposed and joined ones are copies."""
    for path, leaf in leaves.items():
        if not np.isfinite(leaf).all():
            raise InputError(f"parameter {path} holds NaN or infinity; the training diverged: export another step")
    return {name: slot.read(leaves) for name, slot in sorted(names.items())}


def _write(file: Path, tensors: dict[str, np.ndarray], cfg: GPTConfig) -> None:
    fields = {name: getattr(cfg, name) for name in OURS_FIELDS}
    write_tensors(file, tensors, {"format": "pt", OURS: json.dumps(fields)})
