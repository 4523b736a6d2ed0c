"""What the C library does with memory that a program has freed, which decides a third of a CPU's training step."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # the names of glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation, for as long as the process lives; call it before JAX computes.

    XLA allocates a program's temporary memory anew for each run of it. The C library hands large pieces back to the
    operating system, which clears every page of them before it gives them out again: with GPT-2 small half a million
    pages a step. Kept, the memory is there at once, and the process holds the most that it ever needed. Only the main
    thread's large pieces can be kept, so that is where programs for the CPU run, too.

    Nothing changes where there is no glibc (macOS, Windows, musl).
    """
    import jax

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_MMAP_MAX, 0)  # nothing in pages of its own
        jax.config.update("jax_cpu_enable_async_dispatch", False)
