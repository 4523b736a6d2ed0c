"""The commands, one module each: what its options are and what it does; and what all of them do before they compute."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slm_jax.run import Run
    from slm_jax.templates import Template


def use_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX was told of another place."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slm_jax" / "xla"
        with contextlib.suppress(OSError):  # a cache that cannot be written only makes the next start slower
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))


def load(source: str, tokenizer: str | None, n_heads: int | None) -> "Run":
    """Load the model that the options of a command name, with its tokenizer."""
    from slm_jax.run import load_model
    from slm_jax.tokenizer import get_tokenizer

    return load_model(source, None if tokenizer is None else get_tokenizer(tokenizer), n_heads=n_heads)


def template_of(loaded: "Run") -> "Template":
    """Return the template that a model was shown instructions in; say so where it was not, and take Alpaca's."""
    from slm_jax.templates import TEMPLATES

    if loaded.template is not None:
        return loaded.template
    print(f"{loaded.folder}: was not trained on instructions; using the template alpaca", file=sys.stderr)
    return TEMPLATES["alpaca"]
