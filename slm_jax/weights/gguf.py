"""GGUF of llama.cpp and Ollama: names and configuration of its architectures ``llama``, ``qwen3`` and ``gpt2``.

``llama`` stores the outputs of queries and keys in interleaved pairs, ``qwen3`` as Hugging Face does. Llama 3's scaling
of the rotations is no metadata but a tensor, by which each frequency is divided. Source: llama.cpp, ``gguf-py`` and
``convert_hf_to_gguf.py``.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.errors import InputError
from slm_jax.files import parse_json
from slm_jax.model import GPTConfig
from slm_jax.nn.axes import HEAD
from slm_jax.nn.rope import frequencies
from slm_jax.weights.gguf_file import open_file
from slm_jax.weights.gpt2 import NEEDS
from slm_jax.weights.names import POSITIONS, TOKENS, Format, Slot
from slm_jax.weights.ollama import modelfile
from slm_jax.weights.side_files import About
from slm_jax.weights.tensor_files import AGAIN, OURS, TensorFiles

_TURNED = re.compile(r"attn_[qk]\.")  # outputs in interleaved pairs
OUR_FIELDS = (
    *("drop_rate", "unpadded_vocab_size", "rope_factor"),
    *("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context"),
)  # of GPTConfig, which GGUF has no place for
ROPE_FACTORS = "rope_freqs.weight"  # by which each frequency is divided
_TOP = {
    "token_embd.weight": TOKENS,
    "output_norm.weight": "final_norm/scale",
    "output.weight": HEAD,
}
_SHARED = {
    "attn_norm.weight": "norm1/scale",
    "attn_output.weight": "attn/out_proj/kernel",
    "attn_output.bias": "attn/out_proj/bias",
    "ffn_norm.weight": "norm2/scale",
    "ffn_up.weight": "ff/fc/kernel",
    "ffn_up.bias": "ff/fc/bias",
    "ffn_down.weight": "ff/proj/kernel",
    "ffn_down.bias": "ff/proj/bias",
}
_LLAMA = {
    **_SHARED,
    "attn_q.weight": "attn/q/kernel",
    "attn_q.bias": "attn/q/bias",
    "attn_k.weight": "attn/k/kernel",
    "attn_k.bias": "attn/k/bias",
    "attn_v.weight": "attn/v/kernel",
    "attn_v.bias": "attn/v/bias",
    "ffn_gate.weight": "ff/gate/kernel",
    "ffn_gate.bias": "ff/gate/bias",
}
_QWEN3 = {
    **{name: path for name, path in _LLAMA.items() if not name.endswith(".bias")},
    "attn_q_norm.weight": "attn/q_norm/scale",
    "attn_k_norm.weight": "attn/k_norm/scale",
}
_GPT2_TOP = {**_TOP, "position_embd.weight": POSITIONS, "output_norm.bias": "final_norm/bias"}
_GPT2 = {
    **_SHARED,
    "attn_norm.bias": "norm1/bias",
    "attn_qkv.weight": "attn/q/kernel attn/k/kernel attn/v/kernel",
    "attn_qkv.bias": "attn/q/bias attn/k/bias attn/v/bias",
    "ffn_norm.bias": "norm2/bias",
}
# Metadata that change the function that the model computes, with the values that GPTModel supports.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "expert_count": (0,),
    "use_parallel_residual": (False,),
    "rope.scaling.type": ("none", "linear"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUF(Format):
    """Names and configuration of one architecture."""

    architecture: str

    def mismatches(self, cfg: GPTConfig) -> list[str]:
        scaled = self.architecture == "qwen3" and cfg.rope_scaling == "llama3"
        return [*super().mismatches(cfg), *(["rope_scaling none or linear"] if scaled else [])]

    def names(self, cfg: GPTConfig) -> dict[str, Slot]:
        names = super().names(cfg)
        if self.architecture != "llama":
            return names
        return {name: slot._replace(interleaved=bool(_TURNED.search(name))) for name, slot in names.items()}

    def tensor_fields(self, files: TensorFiles) -> dict[str, Any]:
        fields = super().tensor_fields(files)
        return {**fields, "qkv_bias": fields["bias"]}

    def read_names(self, cfg: GPTConfig, files: TensorFiles) -> dict[str, Slot]:
        # Biases may be there for some matrices only; ours are for all, and the others are zero.
        names = self.names(cfg)
        return {name: slot for name, slot in names.items() if name in files.tensors or not name.endswith(".bias")}

    def completed(self, cfg: GPTConfig) -> GPTConfig:
        bias = cfg.bias or self.architecture == "gpt2"
        return dataclasses.replace(cfg, bias=bias, qkv_bias=bias)

    def side_files(self, cfg: GPTConfig, dtype: str, about: About) -> dict[str, bytes]:
        return {"Modelfile": modelfile("model.gguf", cfg.context_length, about).encode()}

    def write_weights(self, folder: Path, cfg: GPTConfig, tensors: dict[str, np.ndarray], about: About) -> None:
        from slm_jax.weights.gguf_writer import write_gguf

        write_gguf(folder / "model.gguf", self, cfg, tensors, about)

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        about = _Metadata(files, self.architecture)
        about.check_supported()
        emb_dim, n_heads = about.whole("embedding_length"), about.whole("attention.head_count")
        head_dim = about.whole("attention.key_length", emb_dim // max(n_heads, 1))
        kv_heads, hidden = about.whole("attention.head_count_kv", n_heads), about.whole("feed_forward_length")
        eps = "attention.layer_norm_epsilon" if self.architecture == "gpt2" else "attention.layer_norm_rms_epsilon"
        fields: dict[str, Any] = {
            "context_length": about.whole("context_length"),
            "emb_dim": emb_dim,
            "n_layers": about.whole("block_count"),
            "n_heads": n_heads,
            "n_kv_heads": None if kv_heads == n_heads else kv_heads,
            "head_dim": None if head_dim * n_heads == emb_dim else head_dim,
            "hidden_dim": None if hidden == 4 * emb_dim else hidden,
            "norm_eps": about.number(eps, 1e-5),
            **{field: value for field, value in about.ours().items() if not field.startswith("rope_")},
        }
        for key in ("attention.value_length", "rope.dimension_count"):
            if (length := about.whole(key, head_dim)) != head_dim and self.architecture != "gpt2":
                raise about.wrong(key, length, f"the size of a head, {head_dim}")
        if self.architecture == "gpt2":
            return fields
        theta = about.number("rope.freq_base", 10_000.0)
        return {**fields, "rope_theta": theta, **self._scaling(files, about, theta, head_dim)}

    def _scaling(self, files: TensorFiles, about: "_Metadata", theta: float, head_dim: int) -> dict[str, Any]:
        factors = files.model_args.get(ROPE_FACTORS)
        linear = about.number("rope.scaling.factor", about.number("rope.scale_linear", 1.0))
        if about.values.get(f"{self.architecture}.rope.scaling.type", "linear") == "linear" and linear not in (0, 1):
            if factors is None:
                return {"rope_scaling": "linear", "rope_factor": linear}
            raise about.wrong("rope.scaling.factor", linear, f"no other scaling beside the tensor {ROPE_FACTORS}")
        if factors is None:
            return {}
        fields = {
            "rope_scaling": "llama3",
            "rope_factor": round(float(factors.max(initial=1)), 4),
            # The other three are not in the file, unless we wrote it; all models of Llama 3 have these.
            **{"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context": 8_192},
            **{field: value for field, value in about.ours().items() if field.startswith("rope_")},
        }
        cfg = GPTConfig(emb_dim=head_dim, n_heads=1, positions="rope", rope_theta=theta, **fields)
        expected = rope_factors(cfg)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise InputError(f"{files.file}: tensor {ROPE_FACTORS} is not Llama 3's scaling, the only one supported")
        return fields


def _form(architecture: str, **changes: Any) -> GGUF:
    settings: dict[str, Any] = {"top": _TOP, "block": _LLAMA, **changes}
    return GGUF(title=f"GGUF ({architecture})", architecture=architecture, prefix="blk.{}.", **settings)


_ROTATED = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu"}
FORMATS = (
    _form("gpt2", needs={**NEEDS, "exact_gelu": False}, top=_GPT2_TOP, block=_GPT2),
    _form("llama", needs={**_ROTATED, "qk_norm": False}),
    _form("qwen3", needs={**_ROTATED, "qk_norm": True, "bias": False}, block=_QWEN3),
)


def open_gguf(file: Path) -> TensorFiles:
    """Open a GGUF file without reading any tensor but the factors of the rotations; errors as for its container."""
    metadata, tensors = open_file(file)
    architecture = metadata.get("general.architecture")
    forms = {form.architecture: form for form in FORMATS}
    if not isinstance(architecture, str) or architecture not in forms:
        raise InputError(f"{file}: GGUF of the architecture {architecture!r:.60}; expected one of {', '.join(forms)}")
    if metadata.get("general.type", "model") != "model":
        raise InputError(f"{file}: GGUF of the type {metadata['general.type']!r:.60}; expected a model")
    if factors := tensors.pop(ROPE_FACTORS, None):
        metadata[ROPE_FACTORS] = np.concatenate(list(factors.chunks())).astype(np.float32)
    return TensorFiles(file, tensors, model_args=metadata, form=forms[architecture])


def rope_factors(cfg: GPTConfig) -> np.ndarray:
    """Return by what each of the head_dim / 2 frequencies is divided, float32."""
    plain = dataclasses.replace(cfg, rope_scaling="none", rope_factor=1.0)
    return np.asarray(frequencies(plain) / frequencies(cfg), np.float32)


class _Metadata:
    """The metadata of an architecture, typed."""

    def __init__(self, files: TensorFiles, architecture: str) -> None:
        self.file, self.architecture, self.values = files.file, architecture, files.model_args

    def wrong(self, key: str, value: object, expected: str) -> InputError:
        return InputError(f"{self.file}: {self.architecture}.{key} is {value!r:.60}; expected {expected}")

    def number(self, key: str, default: float) -> float:
        value = self.values.get(f"{self.architecture}.{key}", default)
        if type(value) not in (int, float):
            raise self.wrong(key, value, "a number")
        return float(value)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # one for each layer
        if type(value) is not int:
            raise self.wrong(key, value, "a whole number")
        return value

    def ours(self) -> dict[str, Any]:
        """Return the fields that GGUF has no place for, which our own files state as JSON."""
        content = parse_json(str(self.values.get(OURS, "{}")), f"{self.file}: metadata {OURS!r}", AGAIN)
        return {field: content[field] for field in OUR_FIELDS if field in content}

    def check_supported(self) -> None:
        for key, allowed in _SUPPORTED.items():
            value = self.values.get(f"{self.architecture}.{key}", allowed[0])
            if not any(value is each or value == each for each in allowed):
                raise self.wrong(key, value, " or ".join(map(repr, allowed)))
