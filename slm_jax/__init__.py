"""A GPT from scratch in JAX: tokenizers, attention, models, pretraining, and text from what was trained."""

from slm_jax.generate import generate
from slm_jax.model import GPTConfig, GPTModel, get_gpt_config
from slm_jax.run import Run, load_run
from slm_jax.tokenizer import get_tokenizer

__version__ = "0.1.0"
__all__ = ["GPTConfig", "GPTModel", "Run", "generate", "get_gpt_config", "get_tokenizer", "load_run"]
