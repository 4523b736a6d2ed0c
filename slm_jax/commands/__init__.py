"""The commands, one module each, and what they share.

A command's module has ``Options``, a frozen dataclass, and ``run(options)``, which returns the exit status; or, where
the words decide which dataclass it is, ``main(args)``. Heavy modules are imported inside ``run``.
"""

from typing import TYPE_CHECKING

from slm_jax.training.compile_cache import set_up, use_compile_cache

if TYPE_CHECKING:
    from slm_jax.runs import Run

__all__ = ["load", "set_up", "use_compile_cache"]


def load(source: str, tokenizer: str | None, n_heads: int | None) -> "Run":
    """Load the model that a command's options name, with its tokenizer."""
    from slm_jax.runs import load_model
    from slm_jax.tokenizer import get_tokenizer

    return load_model(source, None if tokenizer is None else get_tokenizer(tokenizer), n_heads=n_heads)
