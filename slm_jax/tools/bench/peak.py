"""The most memory that something takes, as measured."""

import re
import sys
from pathlib import Path

import jax

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """A context that measures the most memory that is taken within it.

    Attributes:
        n_bytes: when it has ended: on an accelerator of one device, at most, since the process began; on a CPU of the
            process, beyond what it held at first; None where the system does not say.
        of: whose bytes these are, for a person.
    """

    def __init__(self) -> None:
        self._on_cpu = jax.default_backend() == "cpu"
        self.n_bytes: int | None = None
        self.of = "the process, beyond what it held before" if self._on_cpu else "a device, since the process began"

    def __enter__(self) -> "PeakMemory":
        if self._on_cpu:
            _forget_peak()
            self._before = process_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_cpu:
            peak = process_bytes("VmHWM")
            self.n_bytes = None if peak is None or self._before is None else peak - self._before
            return
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        self.n_bytes = max((peak for peak in peaks if peak is not None), default=None)


def _forget_peak() -> None:
    """Let the system count the peak anew; where it refuses, the peak is that of the whole process."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def process_bytes(field: str) -> int | None:
    """Return a size from what Linux says of this process: VmRSS, held now, or VmHWM, the most so far."""
    if sys.platform != "linux":
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else None
