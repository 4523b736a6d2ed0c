"""A GPT from scratch in JAX: tokenizers, attention, models, pretraining, fine-tuning, GPT-2 weights, text from them.

A name is imported when it is first asked for, so that ``import slm_jax`` takes no time, and ``slm-jax --help`` no JAX.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "GPTClassifier": "classifier",
    "GPTConfig": "model",
    "GPTModel": "model",
    "Run": "run",
    "ablate": "capture",
    "capture": "capture",
    "generate": "generate",
    "get_gpt_config": "model",
    "get_tokenizer": "tokenizer",
    "init_cache": "model",
    "load_classifier": "classify",
    "load_gpt2": "weights",
    "load_model": "run",
    "load_run": "run",
    "save_gpt2": "weights",
    "unstack_blocks": "model",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module such as ``slm_jax.tokenizer``."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"slm_jax.{_MODULES[name]}"), name)
    try:
        if name.isidentifier() and not name.startswith("_"):
            return importlib.import_module(f"slm_jax.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"slm_jax.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, in which importing ``slm_jax.generate`` does not put that module in the function's place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
