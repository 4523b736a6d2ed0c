"""Hugging Face's Qwen3: Llama with normalised queries and keys, and no biases in the feed-forward layer.

Source: ``transformers``, ``Qwen3ForCausalLM`` and ``Qwen3Config``.
"""

import dataclasses

from slm_jax.weights import llama

FORMAT = dataclasses.replace(
    llama.FORMAT,
    title="Qwen3",
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    needs={**llama.FORMAT.needs, "qk_norm": True},
    defaults={**llama.FORMAT.defaults, "head_dim": 128},
    biases={"attention_bias": llama.FORMAT.biases["attention_bias"]},
    block={
        **{name: path for name, path in llama.FORMAT.block.items() if not path.startswith("ff/") or "bias" not in path},
        "self_attn.q_norm.weight": "attn/q_norm/scale",
        "self_attn.k_norm.weight": "attn/k_norm/scale",
    },
)
