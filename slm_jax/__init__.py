"""A GPT from scratch in JAX: tokenizers, attention, models, pretraining, fine-tuning, pretrained weights, generation.

A name is imported when it is first used, so that ``import slm_jax`` is fast, and ``slm-jax --help`` needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm_jax import attention, model, tasks, tokenizer
    from slm_jax.evaluation.capture import ablate, capture
    from slm_jax.generation.decode import generate
    from slm_jax.model import GPTClassifier, GPTConfig, GPTModel, get_gpt_config, init_cache
    from slm_jax.nn.blocks import unstack_blocks
    from slm_jax.nn.int8 import quantize
    from slm_jax.runs import Run, load_gpt2, load_model, load_pretrained, load_run
    from slm_jax.tasks.classification import load_classifier
    from slm_jax.tokenizer import get_tokenizer
    from slm_jax.weights import adapters as lora
    from slm_jax.weights.writer import save_gpt2, save_pretrained

__version__ = "0.1.0"
__all__ = [
    "GPTClassifier",
    "GPTConfig",
    "GPTModel",
    "Run",
    "ablate",
    "attention",
    "capture",
    "generate",
    "get_gpt_config",
    "get_tokenizer",
    "init_cache",
    "load_classifier",
    "load_gpt2",
    "load_model",
    "load_pretrained",
    "load_run",
    "lora",
    "model",
    "quantize",
    "save_gpt2",
    "save_pretrained",
    "tasks",
    "tokenizer",
    "unstack_blocks",
]

_MODULES = {name: name for name in ("attention", "model", "tasks", "tokenizer")} | {"lora": "weights.adapters"}
_NAMES = {
    "evaluation.capture": ("ablate", "capture"),
    "generation.decode": ("generate",),
    "model": ("GPTClassifier", "GPTConfig", "GPTModel", "get_gpt_config", "init_cache"),
    "nn.blocks": ("unstack_blocks",),
    "nn.int8": ("quantize",),
    "runs": ("Run", "load_gpt2", "load_model", "load_pretrained", "load_run"),
    "tasks.classification": ("load_classifier",),
    "tokenizer": ("get_tokenizer",),
    "weights.writer": ("save_gpt2", "save_pretrained"),
}


def __getattr__(name: str) -> Any:
    """Import a public name or module when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f"slm_jax.{_MODULES[name]}")
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"slm_jax.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
