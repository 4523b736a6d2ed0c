"""GPT-2 weights in other programs' formats, in and out."""

from slm_jax.weights.save import save_gpt2

__all__ = ["save_gpt2"]
