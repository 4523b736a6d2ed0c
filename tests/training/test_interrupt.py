"""What must hold of signals: the first is noted and acted on where it is safe, the second ends the process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax.experimental import multihost_utils

from slm_jax.training.process import Interrupted, StopRequest

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


def test_without_a_signal_the_handlers_are_put_back_too():
    before = [signal.getsignal(s) for s in SIGNALS]
    with StopRequest() as stop:
        assert [signal.getsignal(s) for s in SIGNALS] != before
    assert stop.signum is None
    assert [signal.getsignal(s) for s in SIGNALS] == before


PROGRAM = """
import time
from slm_jax.training.process import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while stop.signum is None:
        time.sleep(0.01)
    print("noted", flush=True)
    time.sleep(60)  # a step that takes long
"""


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_the_second_signal_ends_the_process(first, second):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == "noted\n"
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(second)
        status = process.wait(timeout=30)
        assert time.monotonic() - began < 30
        assert status == 128 + second  # at once, without unwinding
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


COMPUTING = """
import jax, jax.numpy as jnp
from slm_jax.training.process import keep_freed_memory
from slm_jax.training.process import StopRequest
keep_freed_memory()
program = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda _, x: jnp.sin(x), x)).lower(jnp.ones(8)).compile()
with StopRequest() as stop:
    print("ready", flush=True)
    program(jnp.ones(8))  # minutes, in which Python calls no handler
"""


def test_the_second_signal_ends_the_process_within_a_step():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", COMPUTING], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().startswith("saving, then stopping")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def test_several_processes_stop_together(monkeypatch):
    """They vote at every tenth step, so that all of them save the same one."""
    import numpy as np

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
