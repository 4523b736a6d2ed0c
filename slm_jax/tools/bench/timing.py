"""Repeated measurements of time: warm-up, medians and spread."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repeated measurements of one duration, in order; at least one."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile, interpolated, in seconds."""
        first, third = np.percentile(self.seconds, [25, 75])
        return float(first), float(third)

    @property
    def milliseconds(self) -> tuple[float, ...]:
        """Each repeat in milliseconds."""
        return tuple(1e3 * seconds for seconds in self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures and all repeats for JSON, in seconds."""
        return {
            "median": self.median,
            "quartiles": self.quartiles,
            "range": (min(self.seconds), max(self.seconds)),
            "repeats": self.seconds,
        }

    def __str__(self) -> str:
        scale, unit = (1e3, "ms") if self.median < 1 else (1, "s")
        low, high = (scale * quartile for quartile in self.quartiles)
        spread = f"{low:.4g}-{high:.4g}; {scale * min(self.seconds):.4g}-{scale * max(self.seconds):.4g}"
        return f"{scale * self.median:.4g} {unit}" + (f" ({spread})" if len(self.seconds) > 1 else "")


def time_calls(run: Callable[[], object], *, warmup: int, repeats: int, clock: Clock = time.perf_counter) -> Timing:
    """Time ``repeats`` calls of ``run``, which waits for its own result, after ``warmup`` that are not timed."""
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repeats):
        began = clock()
        run()
        seconds.append(clock() - began)
    return Timing(tuple(seconds))
