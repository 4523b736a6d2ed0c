"""The commands, one module each, and what they share.

A command's module has a frozen dataclass of its options, ``main(args) -> int`` that reads them, and ``run(options)``
that does the work and returns the exit status. Heavy modules are imported inside ``run``.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from slm_jax.files import cache_folder
from slm_jax.training.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from slm_jax.runs import Run

MOST_CACHED = 2 * 2**30  # bytes of compiled programs; beyond, the least recently used are removed


def set_up() -> None:
    """Prepare a process that computes: keep compiled programs and freed memory."""
    keep_freed_memory()
    use_compile_cache()


def use_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError):  # a cache that cannot be written only makes the next start slower
        cache = cache_folder() / "xla"
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            _remove_unfinished(cache)
            # With a limit, JAX locks the cache too, so that two processes can write to it.
            jax.config.update("jax_compilation_cache_max_size", MOST_CACHED)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_compilation_cache_dir", str(cache))


def _remove_unfinished(cache: Path) -> None:
    """Remove programs whose writer died: JAX caches nothing more beside an unfinished one."""
    for program in cache.glob("*-cache"):
        time_of_use = program.with_name(f"{program.name.removesuffix('-cache')}-atime")  # is written last
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            status = program.stat()
            finished = time_of_use.exists() and status.st_size
            if not finished and time.time() - status.st_mtime > 60:
                program.unlink()


def load(source: str, tokenizer: str | None, n_heads: int | None) -> "Run":
    """Load the model that a command's options name, with its tokenizer."""
    from slm_jax.runs import load_model
    from slm_jax.tokenizer import get_tokenizer

    return load_model(source, None if tokenizer is None else get_tokenizer(tokenizer), n_heads=n_heads)
