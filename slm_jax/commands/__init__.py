"""The commands, one module each: what its options are and what it does; and what all of them do before they compute."""

import contextlib
import os
from pathlib import Path


def use_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX was told of another place."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slm_jax" / "xla"
        with contextlib.suppress(OSError):  # a cache that cannot be written only makes the next start slower
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
