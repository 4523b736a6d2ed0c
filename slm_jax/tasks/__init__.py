"""The stages of training: what each gives to the one loop."""

import importlib
from typing import Any

STAGES = ("pretraining", "classification", "instruction")


def __getattr__(name: str) -> Any:
    """Import a stage when it is asked for: ``slm_jax.tasks.instruction``."""
    if name in STAGES:
        return importlib.import_module(f"slm_jax.tasks.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
