"""``save_gpt2``: a model as a folder that Hugging Face, nanoGPT or the book's code can read."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from slm_jax.data.templates import Template
from slm_jax.errors import InputError
from slm_jax.files import check_new_folder, new_folder
from slm_jax.model import GPTConfig, Params
from slm_jax.nn.axes import HEAD, STACK
from slm_jax.nn.blocks import join_blocks
from slm_jax.nn.lora import merge_adapters
from slm_jax.tokenizer import GPT2Tokenizer, Tokenizer
from slm_jax.weights.names import TOKENS, leaf_shapes
from slm_jax.weights.registry import FormatName, formats
from slm_jax.weights.side_files import About
from slm_jax.weights.tensor_files import FLOATS, OURS, OURS_FIELDS
from slm_jax.weights.trees import write_tensors


def save_gpt2(
    cfg: GPTConfig,
    params: Params,
    folder: str | Path,
    *,
    format: FormatName = "huggingface",
    tokenizer: Tokenizer | None = None,
    template: Template | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model for another program and return its folder, which is complete, or absent.

    ``huggingface`` makes a folder that ``transformers`` opens as ``GPT2LMHeadModel``; ``nanogpt`` and ``book`` make one
    ``model.safetensors`` with the names of their state dicts. Tensors keep their dtype. What a format cannot leave out
    is added without changing the logits: missing biases as zeros, and for the book, whose output head is never tied, a
    copy of the token embedding. nanoGPT's code computes the exact GELU and the book's the tanh form, whatever the model
    was trained with: the other form changes logits in the fourth digit.

    Args:
        cfg: the model's configuration.
        params: its parameters; adapters are merged into their matrices.
        folder: where to write; must not exist, or be empty.
        format: ``huggingface``, ``nanogpt`` or ``book``.
        tokenizer: tokenizer of the model. For ``huggingface`` it is written as ``tokenizer.json``, which
            ``transformers`` opens (GPT-2's only if tiktoken's files are on this machine), else as
            ``tokenizer/tokenizer.json``, which slm_jax reads.
        template: template of the conversations that the model was trained on, for its chat template.
        card: figures for Hugging Face's model card, such as ``{"validation loss": 3.2}``.

    Raises:
        InputError: a folder in use or not writable, parameters that do not fit the configuration or are not finite, a
            model that the format cannot hold.
    """
    about = About(name=str(folder), tokenizer=tokenizer, template=template, card=card or {})
    return write_model(cfg, params, folder, format, about)


def write_model(cfg: GPTConfig, params: Params, folder: str | Path, format: FormatName, about: About) -> Path:
    """Write a model as :func:`save_gpt2` does; ``about`` says what lies beside the weights."""
    if format not in get_args(FormatName):
        raise InputError(f"format is {format!r}; expected one of {', '.join(get_args(FormatName))}")
    form, tokenizer = formats()[format], about.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids; the model's vocab_size is {cfg.vocab_size}")
    target, leaves = check_new_folder(folder), _leaves(cfg, params)
    cfg = dataclasses.replace(cfg, **{"qkv_bias": cfg.qkv_bias and cfg.bias, **form.fixed})
    embedding = leaves[TOKENS]
    for path, shape in leaf_shapes(cfg).items():  # what the format cannot leave out
        leaves.setdefault(path, embedding.T if path == HEAD else np.zeros(shape, embedding.dtype))
    tensors = {tensor: slot.read(leaves) for tensor, slot in sorted(form.written_names(cfg).items())}
    with new_folder(target) as partial:
        side_files = form.side_files(cfg, str(embedding.dtype), about)
        for file, content in side_files.items():
            (partial / file).write_bytes(content)
        if tokenizer is not None and not isinstance(tokenizer, GPT2Tokenizer):
            tokenizer.save(partial / "tokenizer")
        fields = {field: getattr(cfg, field) for field in OURS_FIELDS}
        write_tensors(partial / "model.safetensors", tensors, {"format": "pt", OURS: json.dumps(fields)})
    return target


def _leaves(cfg: GPTConfig, params: Params) -> dict[str, np.ndarray]:
    """Move the parameters to the host, and check them against the configuration."""
    if "params" in params or not any(str(name).startswith(STACK) for name in params):
        found = ", ".join(map(str, params)) or "nothing"
        raise InputError(f'params has {found}; expected a model\'s params tree: model.init(...)["params"]')
    flat = flatten_dict(merge_adapters(params if STACK in params else join_blocks(params)), sep="/")
    expected, leaves = leaf_shapes(cfg), {}
    for path in sorted({*flat, *expected}):
        leaf = flat.get(path)
        shape, dtype = getattr(leaf, "shape", None), str(getattr(leaf, "dtype", None))
        if not isinstance(leaf, jax.Array | np.ndarray) or shape != expected.get(path) or dtype not in FLOATS:
            found = f"{type(leaf).__name__} of shape {shape} and dtype {dtype}"
            raise InputError(f"parameter {path} is a {found}; expected floats of shape {expected.get(path)}")
        leaves[path] = np.asarray(leaf)
        if not np.isfinite(leaves[path]).all():
            raise InputError(f"parameter {path} holds NaN or infinity; export an earlier checkpoint")
    return leaves
