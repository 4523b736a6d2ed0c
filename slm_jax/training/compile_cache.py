"""The cache of compiled programs, and what a process does before it computes."""

import contextlib
import os
import time
from pathlib import Path

from slm_jax.files import cache_folder
from slm_jax.training.host_memory import keep_freed_memory

MOST_CACHED = 2 * 2**30  # bytes of compiled programs; beyond them the least recently used are removed


def set_up() -> None:
    """Prepare a process that computes: keep compiled programs and freed memory."""
    keep_freed_memory()
    use_compile_cache()


def use_compile_cache() -> None:
    """Keep compiled programs, small ones too, in the user's cache folder, unless JAX has another one."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError):  # without a cache the next start is only slower
        cache = cache_folder() / "xla"
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            _remove_unfinished(cache)
            # With a limit, JAX locks the cache too, so that two processes can write to it.
            jax.config.update("jax_compilation_cache_max_size", MOST_CACHED)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_compilation_cache_dir", str(cache))


def _remove_unfinished(cache: Path) -> None:
    """Remove programs whose process died while it wrote them: JAX would never replace them."""
    for program in cache.glob("*-cache"):
        time_of_use = program.with_name(f"{program.name.removesuffix('-cache')}-atime")  # is written last
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            status = program.stat()
            finished = time_of_use.exists() and status.st_size
            if not finished and time.time() - status.st_mtime > 60:
                program.unlink()
