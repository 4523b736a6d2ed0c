"""A command under a supervisor starts again after it was killed or lost another process, and only then."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slm_jax.training import supervisor
from slm_jax.training.supervisor import PIPE, Supervisor, lost_process, needs_supervisor

# What it does at each start, in turn; a number is its exit status.
CHILD = """
import os, pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
starts = len(log.read_text()) if log.exists() else 0
log.write_text("x" * (starts + 1))
action = sys.argv[2:][starts]
if action == "hang":
    os.write(int(os.environ["SLM_JAX_SUPERVISOR"]), b".")
    time.sleep(60)
os.kill(os.getpid(), signal.SIGKILL) if action == "kill" else sys.exit(int(action))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    handlers = {signum: signal.getsignal(signum) for signum in supervisor.stopping_signals()}
    monkeypatch.setattr(supervisor, "PAUSE", 0.0)
    monkeypatch.setattr(supervisor, "SILENCE", 0.3)
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def supervised(log, *actions, restarts=3):
    """The exit status, and how often the child was started."""
    status = Supervisor([sys.executable, "-c", CHILD, str(log), *actions], "train", restarts).run()
    return status, len(log.read_text())


@pytest.mark.parametrize(
    ("actions", "restarts", "status", "starts"),
    [
        (["0"], 3, 0, 1),
        (["2"], 3, 2, 1),  # a mistake of the user
        (["1"], 3, 1, 1),  # it diverged
        (["143"], 3, 143, 1),  # it was stopped
        (["kill", "75", "hang", "0"], 3, 0, 4),
        (["75", "75", "0"], 1, 75, 2),
        (["kill"], 0, 137, 1),
    ],
)
def test_what_was_killed_hangs_or_lost_another_process_starts_again(tmp_path, capfd, actions, restarts, status, starts):
    assert supervised(tmp_path / "log", *actions, restarts=restarts) == (status, starts)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == starts - 1
    assert all(line.startswith("train: this process ") and f"of {restarts} from the last" in line for line in lines)


def test_a_signal_reaches_the_child_which_is_not_started_again(tmp_path):
    program = "import time; print('up', flush=True); time.sleep(60)"
    watched = Supervisor([sys.executable, "-c", program], "train", 3)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert watched.run() == 128 + signal.SIGTERM


def test_a_child_ends_when_its_supervisor_is_killed(tmp_path):
    program = (
        "from slm_jax.training import supervisor; import time\n"
        "supervisor.BEAT = 0.05; supervisor.report_to_supervisor(); time.sleep(60)"
    )
    read_end, write_end = os.pipe()
    env = {**os.environ, PIPE: str(write_end), "PYTHONPATH": str(Path(supervisor.__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", program], env=env, pass_fds=[write_end])
    os.close(write_end)
    assert os.read(read_end, 1) == b"."
    os.close(read_end)
    began = time.monotonic()
    assert child.wait(30) == 75
    assert time.monotonic() - began < 10


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_child_that_hangs_ends_with_its_supervisor(tmp_path):
    everything = "from slm_jax.training.supervisor import *; "
    child = f"{everything}report_to_supervisor(); print(os.getpid(), flush=True); time.sleep(60)"
    program = f"{everything}Supervisor([sys.executable, '-c', {child!r}], 'train', 0).run()"
    env = {**os.environ, "PYTHONPATH": str(Path(supervisor.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
    limit = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < limit
        time.sleep(0.02)


ABORT = """\
W1130 12:08:05.7 7102 preemption_sync_manager.cc:147] Failed to retrieve preemption notice: UNAVAILABLE: Socket closed
only expected if one of the tasks is unhealthy
F1130 12:08:05.7 7102 client.h:80] Terminating because the JAX distributed service detected fatal errors. RPC: {}
*** Check failure stack trace: ***
    @     0x7f5b1af40634  absl::LogMessage::SendToLog()
"""


def test_one_line_replaces_the_abort_of_a_process_that_lost_the_coordination_service(capfd):
    log = ABORT.format("PollForError")
    program = f"import os, sys; print('training', file=sys.stderr); os.write(2, {log.encode()!r}); os.abort()"
    assert Supervisor([sys.executable, "-c", program], "train", 0).run() == 75
    training, line = capfd.readouterr().err.splitlines()
    assert training == "training"
    assert line.startswith("train: process 0 died; start all processes again to resume: slm-jax")


def test_what_is_logged_without_an_abort_is_shown(capfd):
    program = f"import os; os.write(2, {ABORT[:100].encode()!r})"
    assert Supervisor([sys.executable, "-c", program], "train", 0).run() == 0
    assert capfd.readouterr().err == ABORT[:100]


@pytest.mark.parametrize(
    ("listed", "name"),
    [("/job:jax_worker/replica:0/task:2\n", "process 2 "), ("1\n3\n", "process 1, 3 "), (None, "process 0 ")],
)
def test_processes_that_did_not_join_are_named(listed, name):
    barrier = f"reached the barrier: 1/4.\nThe first task at the barrier: 0. Some timed out task names:\n{listed}\n\n"
    log = ("" if listed is None else barrier) + "RPC: /xla.coordination.CoordinationService/RegisterTask"
    assert lost_process(log).startswith(f"{name}did not join")


def test_a_job_of_several_processes_and_one_that_may_restart_get_a_supervisor_once(monkeypatch):
    monkeypatch.delenv(PIPE, raising=False)
    assert [needs_supervisor(restarts) for restarts in (0, 1)] == [False, True]
    for name, value in {"ADDRESS": "10.0.0.1:1", "NUM": "2"}.items():
        monkeypatch.setenv({"ADDRESS": "JAX_COORDINATOR_ADDRESS", "NUM": "JAX_NUM_PROCESSES"}[name], value)
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert needs_supervisor(0)
    monkeypatch.setenv(PIPE, "3")
    assert not needs_supervisor(1)
