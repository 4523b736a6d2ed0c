"""A GPT from scratch in JAX: tokenizers, attention, models, pretraining, fine-tuning, GPT-2 weights, text from them."""

from slm_jax import lora, tasks
from slm_jax.capture import ablate, capture
from slm_jax.classifier import GPTClassifier
from slm_jax.classify import load_classifier
from slm_jax.generate import generate
from slm_jax.model import GPTConfig, GPTModel, get_gpt_config, init_cache, unstack_blocks
from slm_jax.run import Run, load_model, load_run
from slm_jax.tokenizer import get_tokenizer
from slm_jax.weights import load_gpt2, save_gpt2

__version__ = "0.1.0"
__all__ = [
    "GPTClassifier",
    "GPTConfig",
    "GPTModel",
    "Run",
    "ablate",
    "capture",
    "generate",
    "get_gpt_config",
    "get_tokenizer",
    "init_cache",
    "load_classifier",
    "load_gpt2",
    "load_model",
    "load_run",
    "lora",
    "save_gpt2",
    "tasks",
    "unstack_blocks",
]
