"""What must hold of a process: signals stop it where that is safe, the second at once; freed memory stays with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from rich.console import Console

from slm_jax.training import process
from slm_jax.training.process import PIPE, Interrupted, Output, StopRequest

ROOT = Path(__file__).parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_signal_is_noted_and_raised_where_it_is_asked_for(signum):
    before = [signal.getsignal(s) for s in SIGNALS]
    with StopRequest() as stop:
        stop.check()
        assert not stop.agreed(1)
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        assert stop.agreed(1)
        with pytest.raises(Interrupted) as raised:
            stop.check()
        assert raised.value.signum == signum
        assert str(raised.value) == signum.name
        with pytest.raises(Interrupted):  # it stays asked for
            stop.check()
    assert [signal.getsignal(s) for s in SIGNALS] == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_a_terminal_that_is_closed_stops_a_process_and_never_at_once(monkeypatch, ignored):
    monkeypatch.setattr(process, "end_now", lambda status: pytest.fail("ended"))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            for _ in range(2):  # from the shell and from the kernel
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.05)
            assert stop.signum == (None if ignored else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_that_nobody_reads_is_dropped():
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w", buffering=1) as pipe:
        output = Output(pipe)
        Console(file=output).print("read")
        assert os.read(read_end, 10) == b"read\n"
        os.close(read_end)
        for _ in range(3):
            Console(file=output).print("dropped")
        assert output.fileno() == pipe.fileno()


COMPUTING = """
import jax, jax.numpy as jnp
from slm_jax.training.process import StopRequest, keep_freed_memory
keep_freed_memory()
program = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda _, x: jnp.sin(x), x)).lower(jnp.ones(8)).compile()
with StopRequest() as stop:
    print("ready", flush=True)
    program(jnp.ones(8))  # minutes, in which Python calls no handler
"""


@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_ends_the_process_within_a_step(second):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    computing = subprocess.Popen(
        [sys.executable, "-c", COMPUTING], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert computing.stdout.readline() == "ready\n"
        computing.send_signal(signal.SIGINT)
        assert computing.stderr.readline() == "\n"
        assert computing.stderr.readline().startswith("saving, then stopping")
        computing.send_signal(second)
        assert computing.wait(timeout=30) == 128 + second  # at once, without unwinding
    finally:
        computing.kill()
        computing.communicate()


@pytest.mark.parametrize(("twice", "ends"), [(5.0, []), (0.0, [143])])
def test_sigterm_from_the_launcher_and_passed_on_by_the_supervisor_counts_once(monkeypatch, twice, ends):
    """Slurm sends it to every process of a step."""
    ended = []
    monkeypatch.setattr(process, "end_now", ended.append)
    monkeypatch.setattr(process, "TWICE", twice)
    monkeypatch.setenv(PIPE, "3")
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)  # two at the same time may be delivered as one
        assert stop.signum == signal.SIGTERM
    assert ended == ends


def test_several_processes_stop_together(monkeypatch):
    """They vote at every tenth step, so that all of them save the same one."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    votes = []

    def gather(mine):
        votes.append(mine)
        return np.array([mine, others])

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    stop = StopRequest()
    others = True
    assert [step for step in range(1, 31) if stop.agreed(step)] == [10, 20, 30]  # though this one had no signal
    others = False
    assert not stop.agreed(40)
    stop.signum = signal.SIGTERM
    stop.check()  # one process that left by itself would leave the others waiting for it
    assert not stop.agreed(41)
    assert stop.agreed(50)
    assert votes == [False, False, False, False, True]


ALLOCATING = """
import resource, sys
import jax, jax.numpy as jnp
from slm_jax.commands import set_up
from slm_jax.training.process import keep_freed_memory

{"default": lambda: None, "keep": keep_freed_memory, "command": set_up}[sys.argv[1]]()
tall = jnp.ones((4096, 8))
program = jax.jit(lambda x: jnp.sin(jnp.sin(x @ x.T) @ x @ x.T).sum())  # each of the sines takes 67 MB
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(tall).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[-3:]))  # a run takes new pages while the heap still grows, as pieces lie in the way of others
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", ALLOCATING, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_a_programs_memory_is_there_when_it_runs_again() -> None:
    by_default = page_faults("default")
    assert by_default > 10_000  # pages of 4 KiB: else this would show nothing
    assert page_faults("keep") < by_default / 10
    assert page_faults("command") < by_default / 10


def test_settings_of_jax_for_other_projects_are_set_back_with_a_note(tmp_path):
    """Those, and training in a thread, which can have no handlers of signals."""
    script = """
import threading, jax
from slm_jax.training.process import JAX_SETTINGS, StopRequest, set_up
set_up()
print([getattr(jax.config, name) for name in JAX_SETTINGS] == [*JAX_SETTINGS.values()])
def train():
    with StopRequest() as stop:
        stop.check()
        print("trained")
thread = threading.Thread(target=train); thread.start(); thread.join()
"""
    other = {"JAX_ENABLE_X64": "1", "JAX_DISABLE_JIT": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    env = {**os.environ, "JAX_NUMPY_RANK_PROMOTION": "raise", "XDG_CACHE_HOME": str(tmp_path), **other}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "trained"]
    assert [line.split()[1] for line in done.stderr.splitlines()] == [*other, "JAX_NUMPY_RANK_PROMOTION"]
