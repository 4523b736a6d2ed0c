"""Memory that is freed stays with the process, in a process of its own: it cannot be undone."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from slm_jax.commands import set_up
from slm_jax.training.process import keep_freed_memory

{"default": lambda: None, "keep": keep_freed_memory, "command": set_up}[sys.argv[1]]()
matrix = jnp.ones((3072, 3072))  # 38 MB, and as much of temporary memory for each of the sines
program = jax.jit(lambda x: jnp.sin(jnp.sin(jnp.sin(x) @ x) @ x).sum())
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(matrix).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[-3:]))  # a run takes new pages while the heap still grows, as pieces lie in the way of others
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_a_programs_memory_is_there_when_it_runs_again() -> None:
    by_default = page_faults("default")
    assert by_default > 10_000  # pages of 4 KiB: else this would show nothing
    assert page_faults("keep") < by_default / 10
    assert page_faults("command") < by_default / 10
