"""``save_pretrained``: a model as a folder that Hugging Face, nanoGPT or the book's code can read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from slm_jax.data.templates import Template
from slm_jax.errors import InputError
from slm_jax.files import check_new_folder, new_folder
from slm_jax.model import GPTConfig, Params
from slm_jax.nn.axes import HEAD, STACK
from slm_jax.nn.blocks import join_blocks
from slm_jax.nn.lora import merge_adapters
from slm_jax.tokenizer import FILE_NAME, GPT2Tokenizer, Tokenizer
from slm_jax.weights.gguf_tokenizer import tokenizer_metadata
from slm_jax.weights.names import CLASS_BIAS, CLASSES, NORM_BIAS, TOKENS, leaf_shapes
from slm_jax.weights.registry import FormatName, GGUFDtype, find_format
from slm_jax.weights.side_files import About
from slm_jax.weights.tensor_files import FLOATS


def save_pretrained(
    cfg: GPTConfig,
    params: Params,
    folder: str | Path,
    *,
    format: FormatName = "huggingface",
    tokenizer: Tokenizer | None = None,
    template: Template | None = None,
    card: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    dtype: GGUFDtype = "float32",
) -> Path:
    """Write a model for another program and return its folder, which is complete, or absent.

    ``huggingface`` makes a folder that ``transformers`` opens as ``GPT2LMHeadModel``, ``LlamaForCausalLM`` or
    ``Qwen3ForCausalLM``, whichever has the model's architecture; ``nanogpt`` and ``book`` make one
    ``model.safetensors`` with the names of their state dicts. Tensors keep their dtype. What a format cannot leave out
    is added without changing the logits: missing biases as zeros, and for the book, whose output head is never tied, a
    copy of the token embedding. nanoGPT's code computes the exact GELU and the book's the tanh form, whatever the model
    was trained with: the other form changes logits in the fourth digit.

    ``gguf`` makes ``model.gguf`` for llama.cpp, with the tokenizer inside, and a ``Modelfile`` for Ollama.

    A classifier becomes ``GPT2ForSequenceClassification``, ``LlamaForSequenceClassification`` or
    ``Qwen3ForSequenceClassification``, whose heads have no bias: ours is moved into the bias of the final norm, which
    gives the same logits. RMSNorm has none; there only a classifier without a bias, or one of zeros, can be written.

    Args:
        cfg: the model's configuration.
        params: its parameters; adapters are merged into their matrices.
        folder: where to write; must not exist, or be empty.
        format: ``huggingface``, ``gguf``, ``nanogpt`` or ``book``.
        tokenizer: tokenizer of the model. For ``huggingface`` it is written as ``tokenizer.json``, which
            ``transformers`` opens (GPT-2's only if tiktoken's files are on this machine), else as
            ``tokenizer/tokenizer.json``, which slm_jax reads.
        template: template of the conversations that the model was trained on, for its chat template.
        card: figures for Hugging Face's model card, such as ``{"validation loss": 3.2}``.
        classes: names of a classifier's classes, in the order of its logits.
        dtype: dtype of the matrices in GGUF: ``float32``, ``float16`` or ``q8_0`` (8 bits, with a scale for 32 values).

    Raises:
        InputError: a folder in use or not writable, parameters that do not fit the configuration or are not finite, a
            model that the format cannot hold.
    """
    about = About(
        name=str(folder), tokenizer=tokenizer, template=template, card=card or {}, classes=tuple(classes), dtype=dtype
    )
    return write_model(cfg, params, folder, format, about)


def write_model(cfg: GPTConfig, params: Params, folder: str | Path, format: FormatName, about: About) -> Path:
    """Write a model as :func:`save_pretrained` does; ``about`` says what lies beside the weights."""
    form, tokenizer, n_classes = find_format(format, cfg), about.tokenizer, len(about.classes)
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids; the model's vocab_size is {cfg.vocab_size}")
    target, leaves = check_new_folder(folder), _leaves(cfg, params, n_classes)
    cfg = form.completed(cfg)
    embedding = leaves[TOKENS]
    for path, shape in leaf_shapes(cfg, n_classes).items():  # what the format cannot leave out
        leaves.setdefault(path, embedding.T if path == HEAD else np.zeros(shape, embedding.dtype))
    names = form.classifier_names(cfg) if n_classes else form.written_names(cfg)
    if CLASS_BIAS in leaves:
        _move_class_bias(leaves, form.title)
    placed = {path for slot in names.values() for path in slot.paths}
    if lost := [path for path in sorted(leaves.keys() - placed) if leaves[path].any()]:
        raise InputError(f"{form.title} has no place for parameter {lost[0]}, which is not zero")
    tensors = {tensor: slot.read(leaves) for tensor, slot in sorted(names.items())}
    with new_folder(target) as partial:
        for file, content in form.side_files(cfg, str(embedding.dtype), about).items():
            (partial / file).write_bytes(content)
        if tokenizer is not None and not (partial / FILE_NAME).exists() and not _is_elsewhere(tokenizer, format):
            tokenizer.save(partial / "tokenizer")
        form.write_weights(partial, cfg, tensors, about)
    return target


save_gpt2 = save_pretrained  # its name when GPT-2 was the only family


def _is_elsewhere(tokenizer: Tokenizer, format: FormatName) -> bool:
    """Return whether a tokenizer is GPT-2's, or in the GGUF file, which then also has its template."""
    if isinstance(tokenizer, GPT2Tokenizer) or format != "gguf":
        return isinstance(tokenizer, GPT2Tokenizer)
    try:
        tokenizer_metadata(tokenizer)
    except InputError:
        return False
    return True


def _leaves(cfg: GPTConfig, params: Params, n_classes: int) -> dict[str, np.ndarray]:
    """Move the parameters to the host, and check them against the configuration."""
    if "params" in params or not any(str(name).startswith(STACK) for name in params):
        found = ", ".join(map(str, params)) or "nothing"
        raise InputError(f'params has {found}; expected a model\'s params tree: model.init(...)["params"]')
    flat = flatten_dict(merge_adapters(params if STACK in params else join_blocks(params)), sep="/")
    expected, leaves = leaf_shapes(cfg, n_classes), {}
    if n_classes and CLASS_BIAS in flat:
        expected[CLASS_BIAS] = (n_classes,)
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


def _move_class_bias(leaves: dict[str, np.ndarray], title: str) -> None:
    """Move the bias of a classifier's head, for which no format has a place, into that of the final norm.

    With the norm's bias b, the head's kernel W and its bias c, (x + b) W + c = (x + b + d) W for a d with d W = c.
    """
    bias = leaves.pop(CLASS_BIAS).astype(np.float64)
    if not bias.any():
        return
    if (norm := leaves.get(NORM_BIAS)) is None:
        raise InputError(f"{title}'s classifiers have no bias, as this one has, and no norm with a bias to move it to")
    kernel = leaves[CLASSES].astype(np.float64)
    shift = np.linalg.lstsq(kernel.T, bias)[0]
    leaves[NORM_BIAS] = (norm + shift).astype(norm.dtype)
    error = np.abs((leaves[NORM_BIAS] - norm.astype(np.float64)) @ kernel - bias).max()
    if error > 16 * float(jnp.finfo(norm.dtype).eps) * max(1, np.abs(bias).max()):
        raise InputError(
            f"the classifier's head has a bias that its kernel cannot express; {title} has no place for it"
        )
