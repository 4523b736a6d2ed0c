"""Set-up of a process that computes: the cache of compiled programs, freed memory, signals, and closed output.

The first SIGINT, SIGTERM or SIGHUP is a request: the loop saves and ends after the step. A second one ends at once.
A process whose output is closed continues without it.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from slm_jax.errors import InputError
from slm_jax.files import cache_folder

MOST_CACHED = 2 * 2**30  # bytes of compiled programs; above, the least recently used are removed
LOST = 75  # exit status after another process of the job was lost: sysexits.h's EX_TEMPFAIL
PIPE = "SLM_JAX_SUPERVISOR"  # environment variable of a supervised process: the descriptor of its pipe
TWICE = 5.0  # seconds in which it may get SIGTERM twice: from the launcher, and passed on by its supervisor
# Settings that the programs need; environment variables set for another project may differ.
JAX_SETTINGS = {
    "jax_enable_x64": False,
    "jax_disable_jit": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
HANGUP = getattr(signal, "SIGHUP", 0)  # sent, perhaps twice, when a terminal is closed; not on Windows
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # named as in glibc's malloc.h


def set_up() -> None:
    """Prepare a process that computes: keep compiled programs and freed memory, and start JAX.

    Raises:
        InputError: JAX cannot compute on the platform that JAX_PLATFORMS names.
    """
    import jax

    for name, value in JAX_SETTINGS.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)
            print(f"note: {name.upper()} is ignored: slm_jax needs JAX's default, {value}", file=sys.stderr)
    keep_freed_memory()
    use_compile_cache()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = f"{error}".partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "no such device"
        reason = re.sub(r"Unable to initialize backend '\w+': (INTERNAL: )?", "", reason)
        asked = os.environ.get("JAX_PLATFORMS")
        remedy = f"JAX_PLATFORMS is {asked}: unset it, or install what it needs" if asked else "try JAX_PLATFORMS=cpu"
        raise InputError(f"JAX cannot start its devices ({reason}); {remedy}") from None


def use_compile_cache() -> None:
    """Keep compiled programs, small ones too, in the user's cache folder, unless JAX has another one."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError):  # without a cache the next start is only slower
        cache = cache_folder() / "xla"
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            return
        # Remove programs whose process died while writing them: JAX would never replace them.
        for program in cache.glob("*-cache"):
            time_of_use = program.with_name(f"{program.name.removesuffix('-cache')}-atime")  # is written last
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                if not time_of_use.exists() and time.time() - program.stat().st_mtime > 60:
                    program.unlink()
        _verify_programs()
        # With a limit, JAX locks the cache too, so that two processes can write to it.
        jax.config.update("jax_compilation_cache_max_size", MOST_CACHED)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _verify_programs() -> None:
    """Make JAX verify each program of its cache before it is used; a damaged one is removed and compiled again.

    With the package zstandard JAX stores programs without a checksum, and damaged ones compute wrong numbers or crash.
    It has no public place for a checksum: where its classes have changed, nothing is verified.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import compilation_cache

        if compilation_cache.LRUCache.__module__ == __name__:
            return

        class Verified(compilation_cache.LRUCache):
            def get(self, key: str) -> bytes | None:
                content = super().get(key)
                if content is None:
                    return None
                program, digest = content[:-32], content[-32:]
                if hashlib.sha256(program).digest() == digest:
                    return program
                with contextlib.suppress(OSError):
                    (self.path / f"{key}-cache").unlink()
                return None

            def put(self, key: str, value: bytes) -> None:
                super().put(key, value + hashlib.sha256(value).digest())

        compilation_cache.LRUCache = Verified  # type: ignore[misc]


def keep_freed_memory() -> None:
    """Keep freed memory for later allocations as long as the process lives; call it before JAX computes.

    XLA allocates a program's temporary memory each time the program runs. The C library returns large blocks to the
    operating system, which clears each page before handing it out again: half a million pages a step with GPT-2 small,
    a third of the step's time on a CPU. Only large blocks of the main thread can be kept, so CPU programs are run in
    it. Nothing changes without glibc (macOS, Windows, musl).
    """
    import jax

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_MMAP_MAX, 0)  # no block in pages of its own
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def stopping_signals() -> list[int]:
    """Return the signals that stop a process: not SIGHUP where it is ignored, as under nohup."""
    hangup = [HANGUP] if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN else []
    return [signal.SIGINT, signal.SIGTERM, *hangup]


class Output:
    """A text stream that discards output once its reader, such as ``head`` or a terminal, has ended."""

    def __init__(self, stream: Any):  # TextIO, or what stands in for it in a notebook
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or discard it."""
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, or discard it."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError), Path(os.devnull).open("wb") as null:  # a notebook has no descriptor
            os.dup2(null.fileno(), self._stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Continue without stdout or stderr if they are closed."""
    out, errors = Output(sys.stdout), Output(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            yield
        finally:
            out.flush()


@contextlib.contextmanager
def quiet_callbacks() -> Iterator[None]:
    """Hide errors that cannot be caught: if a save fails, each of TensorStore's hundred callbacks prints one."""
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # may come only at exit
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


class Interrupted(Exception):
    """A stop was requested by the signal ``signum``; the process exits with 128 + signum."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """A context manager that records the first SIGINT, SIGTERM or SIGHUP; :meth:`check` raises where stopping is safe.

    A thread watches for signals, too, because Python runs handlers only between steps, and a step may take long.
    Outside the main thread, where Python allows no handlers, signals are not recorded.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._signals = stopping_signals()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        watcher = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        watcher.start()
        self._undo.callback(watcher.join)
        self._undo.callback(os.close, write_end)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_end))  # each signal writes its number
        for signum in self._signals:
            self._undo.callback(signal.signal, signum, signal.signal(signum, self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _note(self, signum: int, _frame: FrameType | None = None) -> None:
        self.signum = self.signum or signum

    def _watch(self, read_end: int) -> None:
        """Record the first signal, and end the process at the second."""
        came, first = 0, 0.0
        with os.fdopen(read_end, "rb", buffering=0) as signals:
            while number := signals.read(1):  # empty once the other end is closed
                if number[0] not in self._signals:
                    continue
                if number[0] == HANGUP:
                    self._note(HANGUP)
                    continue
                same = number[0] == signal.SIGTERM and PIPE in os.environ and time.monotonic() - first < TWICE
                if came and same:
                    continue
                came, first = came + 1, time.monotonic()
                if came > 1:
                    end_now(128 + number[0])
                self._note(number[0])
                if number[0] == signal.SIGINT:
                    print("\nsaving, then stopping; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise :class:`Interrupted` after a signal; several processes stop together instead (:meth:`agreed`)."""
        import jax

        if self.signum is not None and jax.process_count() == 1:
            raise Interrupted(self.signum)

    def agreed(self, step: int) -> bool:
        """Return whether to stop after this step; several processes agree on it at every tenth step."""
        import jax

        if jax.process_count() == 1:
            return self.signum is not None
        if step % 10:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(self.signum is not None).any())


def end_now(status: int, line: str | None = None) -> NoReturn:
    """Exit without unwinding, as an exception inside the compiler can crash; safe, as a rename commits a checkpoint."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # show the cursor that the live line hides
    if line is not None:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    os._exit(status)
