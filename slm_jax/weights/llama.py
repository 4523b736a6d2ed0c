"""Hugging Face's Llama (also SmolLM2 and TinyLlama): names and configuration.

Biases are there for the attention or the feed-forward layer alone, too; ours are for both, and the others are zero.
Source: ``transformers``, ``LlamaForCausalLM`` and ``LlamaConfig``.
"""

import dataclasses
import re
from json import dumps
from pathlib import Path
from typing import Any

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import read_json
from slm_jax.model import GPTConfig, axis_sizes
from slm_jax.nn.axes import HEAD
from slm_jax.weights.huggingface import HuggingFace
from slm_jax.weights.names import TOKENS, Slot
from slm_jax.weights.tensor_files import TensorFiles

_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "emb_dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
}
# Keys of one kind of RoPE scaling, and our fields.
_SCALINGS = {
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_context",
    },
}
# What GPTModel does not compute, by the keys that switch it on.
_UNSUPPORTED = {
    r"use_sliding_window": "attention in a sliding window",
    r"num_(local_|routed_)?experts|n_routed_experts|moe_.*": "a mixture of experts",
    r".*sink.*": "attention sinks",
    r".*soft_?cap.*": "capped logits",
    r"quantization_config": "quantized weights",
    r"rope_interleaved": "rotary positions of neighbouring pairs",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama(HuggingFace):
    """Names and configuration of ``LlamaForCausalLM``, and of models that differ in few names or keys."""

    defaults: dict[str, Any]  # values of keys that config.json may lack
    biases: dict[str, str]  # keys that switch biases on, and regular expressions of the names

    def recognise(self, files: TensorFiles) -> bool:
        return any(re.fullmatch(r"layers\.\d+\.self_attn\.q_proj\.weight", name) for name in files.tensors)

    def tensor_fields(self, files: TensorFiles) -> dict[str, Any]:
        fields = super().tensor_fields(files)
        return {**fields, "qkv_bias": fields["bias"]}

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        file, content = _read_config(files)
        _check_supported(file, content)
        fields: dict[str, Any] = {}
        for key, field in _FIELDS.items():
            fields[field] = value = content.get(key, self.defaults.get(key))
            if type(value) not in (int, float) and (value is not None or key not in self.defaults):
                raise InputError(f"{file}: {key} is {dumps(value):.60}; expected a number")
        fields |= _rope_fields(file, content)
        # Sizes that no other tensor determines; the model's rotations are computed for them.
        width = fields["n_heads"] * (fields["head_dim"] or fields["emb_dim"] // max(fields["n_heads"], 1))
        query = files.tensors.get("layers.0.self_attn.q_proj.weight")
        if query is not None and query.shape[:1] != (width,):
            raise InputError(f"{query.file}: tensor {query.name} has the shape {query.shape}; expected {width} rows")
        fields["bias"] = any(bool(content.get(key)) for key in self.biases)
        if not content.get("tie_word_embeddings", True):
            fields["tie_weights"] = False
        return fields

    def read_names(self, cfg: GPTConfig, files: TensorFiles) -> dict[str, Slot]:
        _, content = _read_config(files)
        absent = "|".join(pattern for key, pattern in self.biases.items() if not content.get(key))
        return {name: slot for name, slot in self.names(cfg).items() if not re.fullmatch(absent, name)}

    def completed(self, cfg: GPTConfig) -> GPTConfig:
        return dataclasses.replace(cfg, qkv_bias=cfg.bias)

    def config(self, cfg: GPTConfig) -> dict[str, Any]:
        sizes = {"n_kv_heads": "kv_heads", "head_dim": "head_dim", "hidden_dim": "mlp"}
        resolved = {**vars(cfg), **{field: axis_sizes(cfg)[axis] for field, axis in sizes.items()}}
        return {
            **{key: resolved[field] for key, field in _FIELDS.items()},
            "hidden_act": "silu",
            "rope_theta": cfg.rope_theta,
            "rope_scaling": _rope_scaling(cfg),
            **dict.fromkeys(self.biases, cfg.bias),
            "attention_dropout": cfg.drop_rate,
        }


def _read_config(files: TensorFiles) -> tuple[Path, dict[str, Any]]:
    file = files.file.parent / "config.json"
    if not file.is_file():
        raise MissingInputError(f"{file}: no such file; the number of heads and the positions are stated in it")
    return file, read_json(file)


def _check_supported(file: Path, content: dict[str, Any]) -> None:
    """Refuse what the model would silently compute in another way."""
    for key, value in content.items():
        feature = next((feature for pattern, feature in _UNSUPPORTED.items() if re.fullmatch(pattern, key)), None)
        if feature and value not in (None, False, 0, [], {}):
            raise InputError(f"{file}: {key} is {dumps(value):.60}: {feature}, which slm_jax does not compute")
    allowed: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1, None)}
    if "use_sliding_window" not in content:
        allowed["sliding_window"] = (None,)
    for key, values in allowed.items():
        if content.get(key, values[0]) not in values:
            raise InputError(f"{file}: {key} is {dumps(content[key]):.60}; expected {dumps(values[0])}")
    kinds = content.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise InputError(f"{file}: layer_types is {dumps(kinds):.60}; expected only full_attention")


def _rope_fields(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of RoPE: transformers 4 states them in ``rope_scaling``, 5 in ``rope_parameters``."""
    name = "rope_parameters" if content.get("rope_parameters") is not None else "rope_scaling"
    stated = content.get(name) or {}
    if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
        raise InputError(f"{file}: {name} is {dumps(stated):.60}; expected the parameters of all layers, or null")
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in ("default", *_SCALINGS):
        raise InputError(f"{file}: {name} has the type {dumps(kind):.60}; expected default, {' or '.join(_SCALINGS)}")
    if stated.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"{file}: partial_rotary_factor is {dumps(stated['partial_rotary_factor']):.60}; expected 1")
    fields: dict[str, Any] = {"rope_theta": stated.get("rope_theta", content.get("rope_theta", 10_000.0))}
    if kind != "default":
        fields["rope_scaling"] = kind
    for key, field in _SCALINGS.get(kind, {}).items():
        if key not in stated:
            raise InputError(f"{file}: {name} of type {kind} has no {key}; expected a number")
        fields[field] = stated[key]
    for field, value in fields.items():
        if field != "rope_scaling" and type(value) not in (int, float):
            raise InputError(f"{file}: {field} is {dumps(value):.60}; expected a number")
    return fields


def _rope_scaling(cfg: GPTConfig) -> dict[str, Any] | None:
    if cfg.rope_scaling == "none":
        return None
    keys = _SCALINGS[cfg.rope_scaling].items()
    return {"rope_type": cfg.rope_scaling, **{key: getattr(cfg, field) for key, field in keys}}


FORMAT = Llama(
    title="Llama",
    model_type="llama",
    architectures=("LlamaForCausalLM", "LlamaForSequenceClassification"),
    needs={"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "qk_norm": False},
    defaults={"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6},
    biases={"attention_bias": r"layers\.\d+\.self_attn\..*\.bias", "mlp_bias": r"layers\.\d+\.mlp\..*\.bias"},
    top={
        "embed_tokens.weight": TOKENS,
        "norm.weight": "final_norm/scale",
        "lm_head.weight": HEAD,
    },
    prefix="layers.{}.",
    block={
        "input_layernorm.weight": "norm1/scale",
        "self_attn.q_proj.weight": "attn/q/kernel",
        "self_attn.q_proj.bias": "attn/q/bias",
        "self_attn.k_proj.weight": "attn/k/kernel",
        "self_attn.k_proj.bias": "attn/k/bias",
        "self_attn.v_proj.weight": "attn/v/kernel",
        "self_attn.v_proj.bias": "attn/v/bias",
        "self_attn.o_proj.weight": "attn/out_proj/kernel",
        "self_attn.o_proj.bias": "attn/out_proj/bias",
        "post_attention_layernorm.weight": "norm2/scale",
        "mlp.gate_proj.weight": "ff/gate/kernel",
        "mlp.gate_proj.bias": "ff/gate/bias",
        "mlp.up_proj.weight": "ff/fc/kernel",
        "mlp.up_proj.bias": "ff/fc/bias",
        "mlp.down_proj.weight": "ff/proj/kernel",
        "mlp.down_proj.bias": "ff/proj/bias",
    },
    front="model.",
    buffers=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
