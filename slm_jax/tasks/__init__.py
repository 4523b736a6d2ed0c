"""Tasks: what each kind of training gives to the one loop; the registry is :mod:`slm_jax.tasks.config`.

``pretraining`` trains a model to predict the next token, ``classification`` fine-tunes it to predict the class of a
text, ``instruction`` to follow instructions (chapters 5, 6 and 7 of the book), and ``preference`` to prefer one
response to another (DPO). ``base`` holds what training starts from. A module is imported when it is first used:
``slm_jax.tasks.instruction``.
"""

import importlib
import importlib.util
from typing import Any


def __getattr__(name: str) -> Any:
    """Import a module of this package when it is first used."""
    if name.startswith("_") or importlib.util.find_spec(f"slm_jax.tasks.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"slm_jax.tasks.{name}")
