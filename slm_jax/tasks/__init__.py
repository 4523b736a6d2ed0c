"""The stages of training: what each gives to the one loop.

``pretraining`` trains a new model to predict the next token, ``classification`` fine-tunes a model to tell the class of
a text, and ``instruction`` to answer instructions (the book's chapters 5, 6 and 7). ``base`` holds what fine-tuning
starts from. A stage is imported when it is first asked for: ``slm_jax.tasks.instruction``.
"""

import importlib
from typing import Any

STAGES = ("pretraining", "classification", "instruction")


def __getattr__(name: str) -> Any:
    """Import a stage when it is asked for: ``slm_jax.tasks.instruction``."""
    if name in STAGES:
        return importlib.import_module(f"slm_jax.tasks.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
