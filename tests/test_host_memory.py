"""Memory that is freed stays with the process, in a process of its own: it cannot be undone."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
from slm_jax.host_memory import keep_freed_memory

def page_faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'x' * (megabytes * 2**20)  # not NumPy's memory, which is in huge pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure():
    page_faults(100)
    found.append(page_faults(100))

found = []
if sys.argv[1] == "keep":
    keep_freed_memory()
measure()
thread = threading.Thread(target=measure)
thread.start()
thread.join()
print(*found)
"""


def page_faults(mode: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept_in_all_threads() -> None:
    assert min(page_faults("default")) > 1_000  # else this test would show nothing: 100 MB are 25,600 pages of 4 KiB
    assert max(page_faults("keep")) < 100
