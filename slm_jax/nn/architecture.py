"""What an architecture is: :class:`GPTConfig`, whose defaults are GPT-2's, presets, and the sizes of the named axes.

Each difference between GPT-2 and Llama or Qwen3 is a field of its own, and every combination of them is a model.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

from slm_jax.errors import InputError

DType = Literal["float32", "bfloat16", "float16"]
Remat = Literal["none", "dots", "full"]
Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rope"]
RopeScaling = Literal["none", "linear", "llama3"]
AttentionKind = Literal["auto", "xla", "cudnn", "flash", "explicit"]
MLP = Literal["gelu", "swiglu"]

_CHOICES: dict[str, Any] = {
    "norm": Norm, "positions": Positions, "rope_scaling": RopeScaling, "mlp": MLP, "dtype": DType,
    "param_dtype": DType, "remat": Remat, "attention": AttentionKind,
}  # fmt: skip
_SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "rope_original_context")
_OPTIONAL_SIZES = ("n_kv_heads", "head_dim", "hidden_dim")
_NUMBERS = ("norm_eps", "rope_theta", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor")
_SWITCHES = ("qkv_bias", "tie_weights", "bias", "exact_gelu", "qk_norm")


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Shape and execution of a GPT, with the book's field names. The defaults are GPT-2's.

    Raises:
        InputError: an impossible value, such as an ``emb_dim`` that ``n_heads`` does not divide.

    Attributes:
        vocab_size: number of token ids.
        context_length: maximum number of tokens in a sequence.
        emb_dim: width of the residual stream.
        n_heads: attention heads per block; divides ``emb_dim`` unless ``head_dim`` is given.
        n_layers: number of transformer blocks.
        drop_rate: dropout on embeddings, attention weights and both residual branches; 0 switches it off.
        qkv_bias: whether the query, key and value projections have a bias.
        tie_weights: whether the output head is the transposed token embedding.
        bias: False removes every bias, also those of the layer norms.
        exact_gelu: GELU by the error function, as in nanoGPT, instead of GPT-2's tanh approximation.
        norm: ``layernorm``, or ``rmsnorm``, which only scales (Llama).
        norm_eps: added to the variance, or to the mean square, before its root is taken.
        positions: ``learned`` embeddings, or ``rope``: queries and keys are rotated by their position (Llama).
        rope_theta: base of RoPE's wavelengths.
        rope_scaling: how RoPE is stretched to a longer context: ``none``, ``linear``, or by wavelength (``llama3``).
        rope_factor: by how much it is stretched.
        rope_low_freq_factor: ``llama3``: wavelengths above ``rope_original_context`` over this are stretched.
        rope_high_freq_factor: ``llama3``: wavelengths below ``rope_original_context`` over this stay as they are.
        rope_original_context: ``llama3``: context length before it was stretched.
        mlp: feed-forward layer: ``gelu``, or ``swiglu``, which has a gate (Llama).
        hidden_dim: width inside the feed-forward layer; None: 4 · ``emb_dim``.
        n_kv_heads: heads of keys and values, each of which serves a group of heads (grouped-query attention); divides
            ``n_heads``; None: as many.
        head_dim: width of a head; None: ``emb_dim / n_heads``.
        qk_norm: whether queries and keys are normalised in each head, by RMSNorm (Qwen3).
        dtype: dtype of activations and matrix products; logits are always float32.
        param_dtype: dtype of the parameters.
        remat: gradient checkpointing, what the backward pass recomputes instead of keeping: ``none``, ``dots`` (all but
            the matrix products) or ``full``.
        attention: how attention is computed; ``auto`` takes the fastest implementation that works on the device.
        unroll: compile the stack of blocks layer by layer instead of as a loop; None: on a CPU without remat, where
            that is faster.
        unpadded_vocab_size: ids from here on only pad the vocabulary (nanoGPT's 50,304) and are never sampled; None:
            no such ids.
    """

    vocab_size: int = 50_257
    context_length: int = 1_024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.0
    qkv_bias: bool = True
    tie_weights: bool = True
    bias: bool = True
    exact_gelu: bool = False
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    positions: Positions = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = "none"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8_192
    mlp: MLP = "gelu"
    hidden_dim: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: Remat = "none"
    attention: AttentionKind = "auto"
    unroll: bool | None = None
    unpadded_vocab_size: int | None = None

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise InputError(f"model.{name} is {getattr(self, name)!r}; expected {expected}")

        for name in (*_SIZES, *_OPTIONAL_SIZES):
            value, optional = getattr(self, name), name in _OPTIONAL_SIZES
            holds = (optional and value is None) or (type(value) is int and 1 <= value < 2**31)
            require(name, holds, f"a whole number of at least 1 and below 2**31{', or null' * optional}")
        for name in _NUMBERS:
            value = getattr(self, name)
            holds = type(value) in (int, float) and 0 < value < (2**31 if type(value) is int else math.inf)
            require(name, holds, "a number above 0")
        rate = self.drop_rate
        require("drop_rate", type(rate) in (int, float) and 0 <= rate < 1, "a number of at least 0 and below 1")
        for name in (*_SWITCHES, "unroll"):
            value = getattr(self, name)
            require(name, type(value) is bool or (name == "unroll" and value is None), "true or false")
        for name, kind in _CHOICES.items():
            require(name, getattr(self, name) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        if self.head_dim is None and self.emb_dim % self.n_heads:
            near = math.ceil(self.emb_dim / self.n_heads) * self.n_heads
            require("emb_dim", False, f"a multiple of model.n_heads {self.n_heads}, such as {near}")
        if self.n_kv_heads is not None:
            require("n_kv_heads", self.n_heads % self.n_kv_heads == 0, f"a divisor of model.n_heads {self.n_heads}")
        if self.positions == "rope" and (width := axis_sizes(self)["head_dim"]) % 2:
            raise InputError(f"model.head_dim is {width}; expected an even number with model.positions rope")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        require("rope_low_freq_factor", low < high or self.rope_scaling != "llama3", f"less than {high}, the high one")
        unpadded = self.unpadded_vocab_size
        holds = unpadded is None or (type(unpadded) is int and 1 <= unpadded <= self.vocab_size)
        require("unpadded_vocab_size", holds, f"1 to model.vocab_size {self.vocab_size}, or null")


def axis_sizes(cfg: GPTConfig) -> dict[str, int]:
    """Return the size of every axis that :mod:`slm_jax.nn.axes` names; a classifier also has ``classes``."""
    return {
        "layers": cfg.n_layers,
        "embed": cfg.emb_dim,
        "heads": cfg.n_heads,
        "kv_heads": cfg.n_kv_heads or cfg.n_heads,
        "head_dim": cfg.head_dim or cfg.emb_dim // cfg.n_heads,
        "mlp": cfg.hidden_dim or 4 * cfg.emb_dim,
        "vocab": cfg.vocab_size,
        "positions": cfg.context_length,
    }


Preset = Literal[
    "tiny", "mini", "gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "stories260k", "smollm2-135m",
    "smollm2-360m", "smollm2-1.7b", "tinyllama-1.1b", "llama3.2-1b", "llama3.2-3b", "qwen3-0.6b", "qwen3-1.7b",
]  # fmt: skip
_LLAMA: dict[str, Any] = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "bias": False, "qkv_bias": False}
_SMOLLM2 = {**_LLAMA, "vocab_size": 49_152, "context_length": 8_192}
_LLAMA3_2 = {
    **_LLAMA, "vocab_size": 128_256, "context_length": 131_072, "n_kv_heads": 8, "hidden_dim": 8_192,
    "rope_theta": 500_000.0, "rope_scaling": "llama3", "rope_factor": 32.0,
}  # fmt: skip
_QWEN3 = {
    **_LLAMA, "vocab_size": 151_936, "context_length": 40_960, "n_heads": 16, "n_kv_heads": 8, "head_dim": 128,
    "n_layers": 28, "norm_eps": 1e-6, "rope_theta": 1_000_000.0, "qk_norm": True,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 4_096, "context_length": 128, "emb_dim": 128, "n_heads": 4, "n_layers": 4},
    "mini": {"vocab_size": 4_096, "context_length": 256, "emb_dim": 256, "n_heads": 8, "n_layers": 6},
    "gpt2-small": {"emb_dim": 768, "n_heads": 12, "n_layers": 12},
    "gpt2-medium": {"emb_dim": 1_024, "n_heads": 16, "n_layers": 24},
    "gpt2-large": {"emb_dim": 1_280, "n_heads": 20, "n_layers": 36},
    "gpt2-xl": {"emb_dim": 1_600, "n_heads": 25, "n_layers": 48},
    "stories260k": {
        **_LLAMA, "vocab_size": 512, "context_length": 512, "emb_dim": 64, "n_heads": 8, "n_kv_heads": 4,
        "n_layers": 5, "hidden_dim": 172,
    },
    "smollm2-135m": {
        **_SMOLLM2, "emb_dim": 576, "n_heads": 9, "n_kv_heads": 3, "n_layers": 30, "hidden_dim": 1_536,
        "rope_theta": 100_000.0,
    },
    "smollm2-360m": {
        **_SMOLLM2, "emb_dim": 960, "n_heads": 15, "n_kv_heads": 5, "n_layers": 32, "hidden_dim": 2_560,
        "rope_theta": 100_000.0,
    },
    "smollm2-1.7b": {
        **_SMOLLM2, "emb_dim": 2_048, "n_heads": 32, "n_layers": 24, "hidden_dim": 8_192, "rope_theta": 130_000.0,
    },
    "tinyllama-1.1b": {
        **_LLAMA, "vocab_size": 32_000, "context_length": 2_048, "emb_dim": 2_048, "n_heads": 32, "n_kv_heads": 4,
        "n_layers": 22, "hidden_dim": 5_632, "tie_weights": False,
    },
    "llama3.2-1b": {**_LLAMA3_2, "emb_dim": 2_048, "n_heads": 32, "n_layers": 16},
    "llama3.2-3b": {**_LLAMA3_2, "emb_dim": 3_072, "n_heads": 24, "n_layers": 28},
    "qwen3-0.6b": {**_QWEN3, "emb_dim": 1_024, "hidden_dim": 3_072},
    "qwen3-1.7b": {**_QWEN3, "emb_dim": 2_048, "hidden_dim": 6_144},
}  # fmt: skip


def get_gpt_config(name: str = "gpt2-small", **overrides: Any) -> GPTConfig:
    """Return a preset's :class:`GPTConfig`, with any of its fields replaced.

    Args:
        name: ``tiny`` or ``mini`` (for CPUs), ``gpt2-small`` (also ``small`` or ``gpt2``), ``gpt2-medium``,
            ``gpt2-large``, ``gpt2-xl``, or one of Llama's family: ``stories260k``, ``smollm2-135m``,
            ``smollm2-360m``, ``smollm2-1.7b``, ``tinyllama-1.1b``, ``llama3.2-1b``, ``llama3.2-3b``, ``qwen3-0.6b``,
            ``qwen3-1.7b``.
        **overrides: fields of :class:`GPTConfig`.

    Raises:
        InputError: an unknown preset or field, or an impossible value.
    """
    preset = PRESETS.get("gpt2-small" if name == "gpt2" else name, PRESETS.get(f"gpt2-{name}"))
    if preset is None:
        raise InputError(f"unknown model preset {name!r}; expected one of {', '.join(PRESETS)}")
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    if unknown := sorted(overrides.keys() - fields):
        raise InputError(f"GPTConfig has no field {unknown[0]!r}; expected one of {', '.join(sorted(fields))}")
    return GPTConfig(**{**preset, **overrides})
