"""The supported formats of weights: each is a module of its name in this package."""

from typing import Literal

FormatName = Literal["huggingface", "nanogpt", "book"]
