"""Hugging Face's GPT-2: names, configuration, and the files of a folder that ``transformers`` opens.

Its ``Conv1D`` stores weights as (in, out), like ours. Source: ``transformers``, ``GPT2LMHeadModel`` and ``GPT2Config``.
"""

import re
from typing import Any

from slm_jax.errors import InputError
from slm_jax.files import read_json
from slm_jax.model import GPTConfig, axis_sizes
from slm_jax.weights.files import TensorFiles
from slm_jax.weights.names import NameMap, Slot, expand, shape_fields

NAME = "Hugging Face"
EMBEDDING = "wte.weight"
POSITIONS = "wpe.weight"
HEAD = "lm_head.weight"
TOP: NameMap = {
    EMBEDDING: Slot("tok_emb/embedding"),
    POSITIONS: Slot("pos_emb/embedding"),
    "ln_f.weight": Slot("final_norm/scale"),
    "ln_f.bias": Slot("final_norm/bias"),
    HEAD: Slot("out_head/kernel", transpose=True),
}
BLOCK: NameMap = {
    "ln_1.weight": Slot("norm1/scale"),
    "ln_1.bias": Slot("norm1/bias"),
    "attn.c_attn.weight": Slot("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"),
    "attn.c_attn.bias": Slot("attn/q/bias", "attn/k/bias", "attn/v/bias"),
    "attn.c_proj.weight": Slot("attn/out_proj/kernel"),
    "attn.c_proj.bias": Slot("attn/out_proj/bias"),
    "ln_2.weight": Slot("norm2/scale"),
    "ln_2.bias": Slot("norm2/bias"),
    "mlp.c_fc.weight": Slot("ff/fc/kernel"),
    "mlp.c_fc.bias": Slot("ff/fc/bias"),
    "mlp.c_proj.weight": Slot("ff/proj/kernel"),
    "mlp.c_proj.bias": Slot("ff/proj/bias"),
}
# What changes the function that the model computes, and the only values that ours computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "layer_norm_epsilon": (1e-5,),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True, False),
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "emb_dim",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "num_attention_heads": "n_heads",
}


def clean(name: str) -> str | None:
    """Return a tensor's name as the map has it; None for a buffer that is no weight."""
    name = name.removeprefix("transformer.")
    if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):  # the causal mask; not attn.c_attn.bias
        return None
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def widening(files: TensorFiles) -> list[bool]:
    """Return of each weight that makes vectors wider whether it is (in, out), as here, and not (out, in)."""
    pattern = re.compile(r"h\.\d+\.(attn\.c_attn|mlp\.c_fc)\.weight")
    shapes = [tensor.shape for name, tensor in files.tensors.items() if pattern.fullmatch(name)]
    return [len(shape) != 2 or shape[0] < shape[1] for shape in shapes]


def recognise(files: TensorFiles) -> bool:
    """Whether these cleaned tensors are GPT-2's with weights as (in, out): most of them, as one may be wrong."""
    found = widening(files)
    return bool(found) and 2 * sum(found) >= len(found)


def shapes(files: TensorFiles) -> dict[str, Any]:
    """Return the GPTConfig fields that the shapes tell: all but the number of heads."""
    return {**shape_fields(files.shapes, EMBEDDING, POSITIONS, "h"), "bias": True, "qkv_bias": True}


def stated(files: TensorFiles) -> dict[str, Any]:
    """Return the GPTConfig fields that ``config.json`` states; dropout is left to whoever trains on.

    Raises:
        InputError: a configuration that GPTModel does not compute.
    """
    file = files.file.parent / "config.json"
    if not file.is_file():
        return {}
    content = read_json(file)
    for key, allowed in _FIXED.items():
        if key in content and content[key] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise InputError(f"{file}: {key} is {content[key]!r}; expected {expected}: slm_jax supports nothing else")
    fields: dict[str, Any] = {}
    for key, field in _FIELDS.items():
        value = content.get(key)
        if value is not None and fields.setdefault(field, value) != value:
            raise InputError(f"{file}: n_head is {fields[field]!r} and {key} {value!r}; expected one or the other")
    emb_dim = shapes(files).get("emb_dim")
    hidden = axis_sizes(GPTConfig(emb_dim=emb_dim, n_heads=1))["mlp"] if emb_dim else None
    if hidden and content.get("n_inner") not in (None, hidden):
        raise InputError(f"{file}: n_inner is {content['n_inner']!r}; expected null or {hidden}")
    fields["exact_gelu"] = content.get("activation_function") == "gelu"
    if not content.get("tie_word_embeddings", True):
        fields["tie_weights"] = False
    return fields


def names(cfg: GPTConfig) -> NameMap:
    """Return the name map of a model."""
    return expand(cfg, TOP, BLOCK, "h.{}.")
