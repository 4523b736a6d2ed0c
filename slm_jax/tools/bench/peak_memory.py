"""The peak of the memory in use, as measured."""

import contextlib
import re
import sys
from pathlib import Path

import jax

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """A context that measures the peak of the memory in use.

    Attributes:
        n_bytes: set at the end. On an accelerator: the peak of one device, at most, since the process began; on a CPU:
            the peak of the process, less what it held at first; None: unknown on this system.
        of: what the bytes are of, in words.
    """

    def __init__(self) -> None:
        self._on_cpu = jax.default_backend() == "cpu"
        self._before: int | None = None
        self.n_bytes: int | None = None
        self.of = "the process, beyond what it held before" if self._on_cpu else "a device, since the process began"

    def __enter__(self) -> "PeakMemory":
        if self._on_cpu:
            with contextlib.suppress(OSError):  # where it cannot be reset, the peak is that of the whole process
                _CLEAR.write_text("5")
            self._before = process_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_cpu:
            peak = process_bytes("VmHWM")
            self.n_bytes = None if peak is None or self._before is None else peak - self._before
            return
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        self.n_bytes = max((peak for peak in peaks if peak is not None), default=None)


def process_bytes(field: str) -> int | None:
    """Return a size of this process from Linux: VmRSS, held now, or VmHWM, the peak."""
    if sys.platform != "linux":
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else None
