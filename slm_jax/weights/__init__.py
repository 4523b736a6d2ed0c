"""GPT-2 weights in and out."""

from slm_jax.weights.load import load_gpt2
from slm_jax.weights.save import save_gpt2

__all__ = ["load_gpt2", "save_gpt2"]
