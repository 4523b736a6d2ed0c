"""The supported formats of weights: each is a module of its name in this package, with its ``FORMAT``."""

import importlib
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from slm_jax.weights.names import Format

FormatName = Literal["huggingface", "nanogpt", "book"]


def get_format(name: str) -> "Format":
    """Return a format by its name."""
    return importlib.import_module(f"slm_jax.weights.{name}").FORMAT


def all_formats() -> list["Format"]:
    """Return all formats, in the order in which they are tried."""
    return [get_format(name) for name in get_args(FormatName)]
