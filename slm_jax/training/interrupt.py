"""SIGINT and SIGTERM as a request to stop: the loop saves and ends after the step; a second one ends at once."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import jax


class Interrupted(Exception):
    """A stop was requested.

    Attributes:
        signum: number of the signal; the process exits with 128 + signum.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Records the first SIGINT or SIGTERM; :meth:`check` raises it where stopping is safe.

    Use as a context manager.

    A thread watches for them, too: Python runs a handler only between steps, and a step may take long.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end)  # each signal writes its number
        self._watcher = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        self._watcher.start()
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write_end)
        self._watcher.join()

    def _note(self, signum: int, _frame: FrameType | None = None) -> None:
        self.signum = self.signum or signum

    def _watch(self, read_end: int) -> None:
        """Record the first signal, and end the process at the second."""
        came = 0
        with os.fdopen(read_end, "rb", buffering=0) as signals:
            while number := signals.read(1):  # nothing once the other end is closed
                if number[0] not in self._previous:
                    continue
                came += 1
                if came > 1:
                    _end_now(number[0])
                self._note(number[0])
                if number[0] == signal.SIGINT:
                    print("\nsaving, then stopping; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise :class:`Interrupted` after a signal; several processes only stop together (:meth:`agreed`)."""
        if self.signum is not None and jax.process_count() == 1:
            raise Interrupted(self.signum)

    def agreed(self, step: int) -> bool:
        """Return whether to stop after this step; several processes agree on it at every tenth step."""
        if jax.process_count() == 1:
            return self.signum is not None
        if step % 10:
            return False
        from jax.experimental import multihost_utils

        votes = multihost_utils.process_allgather(self.signum is not None)
        return bool(votes.any())


def _end_now(signum: int) -> None:
    """End without unwinding: an exception inside the compiler can crash, and checkpoints are committed by a rename."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # show the cursor that the live line hides
    os._exit(128 + signum)
