"""Hugging Face's GPT-2: names and configuration.

Its ``Conv1D`` stores weights as (in, out), like ours. Source: ``transformers``, ``GPT2LMHeadModel`` and ``GPT2Config``.
"""

import re
from json import dumps
from typing import Any

from slm_jax.errors import InputError
from slm_jax.files import read_json
from slm_jax.model import GPTConfig, axis_sizes
from slm_jax.nn.axes import HEAD
from slm_jax.weights.huggingface import HuggingFace
from slm_jax.weights.names import POSITIONS, TOKENS
from slm_jax.weights.tensor_files import TensorFiles

# What makes a model a GPT-2 for every format that has only this family.
NEEDS = {
    "norm": "layernorm",
    "positions": "learned",
    "mlp": "gelu",
    "n_kv_heads": None,
    "head_dim": None,
    "qk_norm": False,
}
FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "emb_dim",
    "n_layer": "n_layers",
    "n_head": "n_heads",
}
# Keys that change the function that the model computes, and the values that GPTModel supports.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True, False),
}


class GPT2(HuggingFace):
    """Names and configuration of ``GPT2LMHeadModel``."""

    def recognise(self, files: TensorFiles) -> bool:
        """Whether most matrices with more outputs than inputs lie as in this format; one of them may be wrong."""
        pattern = re.compile(r"h\.\d+\.(attn\.c_attn|mlp\.c_fc)\.weight")
        shapes = [tensor.shape for name, tensor in files.tensors.items() if pattern.fullmatch(name)]
        n_in_out = sum(len(shape) != 2 or shape[0] < shape[1] for shape in shapes)
        return bool(shapes) and (2 * n_in_out < len(shapes)) == self.out_in

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        file = files.file.parent / "config.json"
        if not file.is_file():
            return {}
        content = read_json(file)
        for key, allowed in _SUPPORTED.items():
            if key in content and content[key] not in allowed:
                expected = " or ".join(map(dumps, allowed))
                raise InputError(f"{file}: {key} is {dumps(content[key]):.60}; expected {expected}")
        fields: dict[str, Any] = {}
        aliases = {"num_attention_heads": "n_heads", "n_inner": "hidden_dim", "layer_norm_epsilon": "norm_eps"}
        for key, field in {**FIELDS, **aliases}.items():
            value = content.get(key)
            if value is not None and fields.setdefault(field, value) != value:
                raise InputError(f"{file}: n_head is {fields[field]!r} and {key} {value!r}; expected one or the other")
        fields["exact_gelu"] = content.get("activation_function") == "gelu"
        if not content.get("tie_word_embeddings", True):
            fields["tie_weights"] = False
        return fields

    def config(self, cfg: GPTConfig) -> dict[str, Any]:
        sizes = axis_sizes(cfg)
        return {
            **{key: getattr(cfg, field) for key, field in FIELDS.items()},
            "n_ctx": cfg.context_length,
            **({} if sizes["mlp"] == 4 * sizes["embed"] else {"n_inner": sizes["mlp"]}),
            "activation_function": "gelu" if cfg.exact_gelu else "gelu_new",
            "layer_norm_epsilon": cfg.norm_eps,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), cfg.drop_rate),
        }


FORMAT = GPT2(
    title="GPT-2",
    architectures=("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    needs=NEEDS,
    top={
        "wte.weight": TOKENS,
        "wpe.weight": POSITIONS,
        "ln_f.weight": "final_norm/scale",
        "ln_f.bias": "final_norm/bias",
        "lm_head.weight": HEAD,
    },
    prefix="h.{}.",
    block={
        "ln_1.weight": "norm1/scale",
        "ln_1.bias": "norm1/bias",
        "attn.c_attn.weight": "attn/q/kernel attn/k/kernel attn/v/kernel",
        "attn.c_attn.bias": "attn/q/bias attn/k/bias attn/v/bias",
        "attn.c_proj.weight": "attn/out_proj/kernel",
        "attn.c_proj.bias": "attn/out_proj/bias",
        "ln_2.weight": "norm2/scale",
        "ln_2.bias": "norm2/bias",
        "mlp.c_fc.weight": "ff/fc/kernel",
        "mlp.c_fc.bias": "ff/fc/bias",
        "mlp.c_proj.weight": "ff/proj/kernel",
        "mlp.c_proj.bias": "ff/proj/bias",
    },
    front="transformer.",
    buffers=r"h\.\d+\.attn\.(bias|masked_bias)",  # the mask; not attn.c_attn.bias
    out_in=False,
    fixed={"bias": True, "qkv_bias": True},
)
