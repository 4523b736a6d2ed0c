"""nanoGPT's ``ckpt.pt``: Hugging Face's names, with weights as PyTorch's ``Linear`` has them, (out, in).

``bias=False`` drops every bias. Source: karpathy/nanoGPT, ``model.py`` and ``train.py``.
"""

from typing import Any

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig
from slm_jax.weights import huggingface
from slm_jax.weights.files import OURS, TensorFiles
from slm_jax.weights.names import NameMap, Slot, expand

NAME = "nanoGPT"
EMBEDDING = huggingface.EMBEDDING
POSITIONS = huggingface.POSITIONS
HEAD = huggingface.HEAD
_FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "bias": "bias",
}

clean = huggingface.clean


def recognise(files: TensorFiles) -> bool:
    """Whether these cleaned tensors are GPT-2's with weights as (out, in)."""
    return bool(huggingface.widening(files)) and not huggingface.recognise(files)


def shapes(files: TensorFiles) -> dict[str, Any]:
    """Return the GPTConfig fields that the shapes tell: all but the number of heads."""
    bias = any(name.endswith(".bias") for name in files.tensors)
    return {**huggingface.shapes(files), "bias": bias}


def stated(files: TensorFiles) -> dict[str, Any]:
    """Return the GPTConfig fields that ``model_args`` states; dropout is left to whoever trains on.

    Raises:
        InputError: a value of another type.
    """
    fields = {field: files.model_args[key] for key, field in _FIELDS.items() if key in files.model_args}
    for field, value in fields.items():
        if not isinstance(value, int):
            raise InputError(
                f"{files.file}: model_args has a {type(value).__name__} for {field}; expected a whole number, or true "
                "or false for bias: save the model with nanoGPT's train.py"
            )
    # nanoGPT computes no other GELU; what we wrote in its format says which one the model was trained with.
    return fields if OURS in files.metadata else {**fields, "exact_gelu": True}


def names(cfg: GPTConfig) -> NameMap:
    """Return the name map of a model."""
    block = {
        name: Slot(*slot.paths, transpose=name.endswith(".weight") and not name.startswith("ln_"))
        for name, slot in huggingface.BLOCK.items()
    }
    return expand(cfg, huggingface.TOP, block, "h.{}.")
