"""SIGINT and SIGTERM as a request to stop: the loop saves and leaves at its next step; a second one ends at once."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

import jax


class Interrupted(Exception):
    """A stop was asked for.

    Attributes:
        signum: the signal's number; a process that ends on it exits with 128 + signum.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Notes the first SIGINT or SIGTERM while it is entered; :meth:`check` raises it where stopping is safe."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        if signum == signal.SIGINT:
            print("\nstopping as soon as all is saved; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, _end_now)
        signal.signal(signal.SIGTERM, _end_now)

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal has come; several processes only stop together (:meth:`agreed`)."""
        if self.signum is not None and jax.process_count() == 1:
            raise Interrupted(self.signum)

    def agreed(self, step: int) -> bool:
        """Return whether to stop after this step; several processes agree on it, at every tenth step."""
        if jax.process_count() == 1:
            return self.signum is not None
        if step % 10:
            return False
        from jax.experimental import multihost_utils

        votes = multihost_utils.process_allgather(self.signum is not None)
        return bool(votes.any())


def _end_now(signum: int, _frame: FrameType | None) -> None:
    """End without unwinding: an exception raised inside the compiler can crash; checkpoints are renamed when whole."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # show the cursor that the live line hides
    os._exit(128 + signum)
