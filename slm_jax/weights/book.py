"""The book's ``GPTModel``: query, key and value in separate tensors, and an output head of its own.

Source: rasbt/LLMs-from-scratch, chapter 4 (``GPTModel``) and chapter 5 (how it is saved).
"""

from slm_jax.nn.axes import HEAD
from slm_jax.weights.gpt2 import NEEDS
from slm_jax.weights.names import POSITIONS, TOKENS, Format

FORMAT = Format(
    title="the book",
    needs={**NEEDS, "hidden_dim": None, "norm_eps": 1e-5},
    top={
        "tok_emb.weight": TOKENS,
        "pos_emb.weight": POSITIONS,
        "final_norm.scale": "final_norm/scale",
        "final_norm.shift": "final_norm/bias",
        "out_head.weight": HEAD,
    },
    prefix="trf_blocks.{}.",
    block={
        "att.W_query.weight": "attn/q/kernel",
        "att.W_key.weight": "attn/k/kernel",
        "att.W_value.weight": "attn/v/kernel",
        "att.W_query.bias": "attn/q/bias",
        "att.W_key.bias": "attn/k/bias",
        "att.W_value.bias": "attn/v/bias",
        "att.out_proj.weight": "attn/out_proj/kernel",
        "att.out_proj.bias": "attn/out_proj/bias",
        "ff.layers.0.weight": "ff/fc/kernel",
        "ff.layers.0.bias": "ff/fc/bias",
        "ff.layers.2.weight": "ff/proj/kernel",
        "ff.layers.2.bias": "ff/proj/bias",
        "norm1.scale": "norm1/scale",
        "norm1.shift": "norm1/bias",
        "norm2.scale": "norm2/scale",
        "norm2.shift": "norm2/bias",
    },
    buffers=r"trf_blocks\.\d+\.att\.mask",
    fixed={"bias": True, "tie_weights": False},
)
