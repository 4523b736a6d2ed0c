"""The profile of a few steps: their time on the host and on the devices."""

from collections.abc import Callable
from pathlib import Path

import jax

from slm_jax.training.config import parse_profile

FOLDER = "profile"  # in the run's folder


class StepProfile:
    """Profiles the requested steps (FROM:TO), once; use as a context manager."""

    def __init__(self, steps: str | None, folder: Path, note: Callable[[str], None]):
        self._steps = None if steps is None else parse_profile(steps)
        self._folder, self._note = folder / FOLDER, note
        self._running = self._begun = False

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def at(self, step: int, wait: Callable[[], None]) -> None:
        """Start or stop at this step; ``wait`` returns once the devices have done all steps up to it."""
        if self._steps is None:
            return
        begin, end = self._steps
        if begin <= step < end and not self._begun:  # a resumed run may start in the middle
            wait()  # so that no earlier step is in the profile
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = self._begun = True
        elif step == end and self._running:
            wait()
            self.end()

    def end(self) -> None:
        """Write the profile, at its last step or where the run ends before; note if there is none."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._note(
                f"profile written to {self._folder}: open perfetto_trace.json.gz of it at ui.perfetto.dev, or the "
                "folder with xprof"
            )
        elif self._steps and not self._begun:
            self._note(f"no profile: this start did not reach step {self._steps[0]:,} of train.profile")
