"""A parent process for training: it reports in one line why a job ended, and with ``--restarts`` restarts it.

The command runs as a child process, which sends a heartbeat through a pipe. The parent kills a child that hangs; a
child whose parent is gone ends itself. Signals are passed on. If a process loses the coordination service, JAX aborts
it with a C++ trace, which the parent replaces by a line that names the lost process.
"""

import contextlib
import ctypes
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import slm_jax
from slm_jax.training.process import LOST, PIPE, end_now, stopping_signals

BEAT = 2.0  # seconds between two heartbeats of the child
SILENCE = 40.0  # seconds without a heartbeat after which it is killed; longer than processes take to notice a lost one
PAUSE = 45.0  # seconds before a restart; by then every other process of the job has noticed, and has ended

_PR_SET_PDEATHSIG = 1  # named as in sys/prctl.h
_LOG = re.compile(rb"[WEF]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)")  # JAX's coordination
_ABORT = b"the JAX distributed service detected fatal errors"


def needs_supervisor(restarts: int) -> bool:
    """Return whether this process should supervise training in a child: if the job has several, or for restarts."""
    from slm_jax.training.distributed import join_arguments

    return PIPE not in os.environ and (restarts > 0 or bool(join_arguments(os.environ)))


def report_to_supervisor() -> None:
    """Send heartbeats to the supervisor, if there is one, as long as the process lives."""
    if PIPE in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # Linux ends it even if it hangs
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        threading.Thread(target=_beat, args=(int(os.environ[PIPE]),), daemon=True).start()


def _beat(pipe: int) -> None:
    try:
        while os.write(pipe, b"."):
            time.sleep(BEAT)
    except OSError:  # the supervisor was killed
        end_now(LOST)


def how_to_resume() -> str:
    """Return what to do after a process was lost, with this process's command."""
    return f"start all processes again to resume: {shlex.join(['slm-jax', *sys.argv[1:]])}"


def lost_process(log: str) -> str:
    """Return which process was lost and how, from what JAX logs before it aborts."""
    if "RegisterTask" in log:
        listed = log.rpartition("timed out task names:")[2].partition("\n\n")[0]
        late = re.findall(r"^(?:/job.*task:)?(\d+)$", listed, re.MULTILINE) or ["0"]  # process 0 did not answer
        return f"process {', '.join(late)} did not join in time (--join_timeout)"
    failed = dict.fromkeys(re.findall(r"task:(\d+)", log)) or ["0"]  # it hosts the coordination service
    return f"process {', '.join(failed)} died"


def supervise(command: str, args: Sequence[str], restarts: int) -> int:
    """Run ``slm-jax COMMAND ARGS`` as a child, restart it up to ``restarts`` times, and return the last exit status.

    It is restarted if it was killed or lost another process, not if it was stopped, diverged or refused its input.
    """
    return Supervisor([sys.executable, "-m", "slm_jax", command, *args], f"slm-jax {command}", restarts).run()


class Supervisor:
    """Runs a command (a list of words) as a child process; messages begin with ``program``."""

    def __init__(self, command: Sequence[str], program: str, restarts: int):
        self._command, self._program, self._restarts = command, program, restarts
        self._child: subprocess.Popen[bytes] | None = None
        self._signum: int | None = None
        self._held: list[bytes] = []  # the child's stderr from JAX's first line about the coordination service on

    def run(self) -> int:
        """Run the command; return the exit status of the last run."""
        for signum in stopping_signals():
            signal.signal(signum, self._pass_on)
        for attempt in range(1, self._restarts + 2):
            status = self._run_once()
            if self._signum is not None or not (status < 0 or status == LOST) or attempt > self._restarts:
                break
            what = f"was ended by {signal.Signals(-status).name}" if status < 0 else "lost another process"
            self._say(
                f"this process {what}; restart {attempt} of {self._restarts} from the last checkpoint in {PAUSE:.0f} s"
            )
            self._sleep(PAUSE)
            if self._signum is not None:
                return 128 + self._signum
        return 128 - status if status < 0 else status

    def _run_once(self) -> int:
        read_end, write_end = os.pipe()
        package = str(Path(slm_jax.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        with os.fdopen(read_end, "rb", buffering=0) as signs:
            self._child = subprocess.Popen(
                self._command,
                env={**os.environ, PIPE: str(write_end), "PYTHONPATH": path},
                stderr=subprocess.PIPE,
                pass_fds=[write_end],
                start_new_session=True,  # a Ctrl-C reaches it once, from here
            )
            os.close(write_end)
            assert self._child.stderr is not None
            relay = threading.Thread(target=self._relay, args=(self._child.stderr,), daemon=True)
            relay.start()
            heard: float | None = None  # no limit before the first heartbeat: imports may take long
            while (status := self._child.poll()) is None:
                if select.select([signs], [], [], 0.2)[0] and signs.read(1024):
                    heard = time.monotonic()
                elif heard is not None and time.monotonic() - heard > SILENCE:
                    self._child.kill()
            relay.join(5)  # a grandchild may still hold its stderr
            return self._explained(status)

    def _relay(self, stderr: IO[bytes]) -> None:
        """Pass the child's stderr on, but hold JAX's lines about the coordination service, as an abort may follow."""
        self._held, last = [], 0.0
        with stderr:
            for line in stderr:
                if self._held and time.monotonic() - last > 5:  # no abort followed
                    self._release(b"")
                if self._held or _LOG.match(line):
                    self._held.append(line)
                    last = time.monotonic()
                else:
                    self._write(line)

    def _explained(self, status: int) -> int:
        """Report why the child ended, unless it did so itself; return its status, or `LOST` if JAX aborted it."""
        log = b"".join(self._held).decode(errors="replace")
        aborted = _ABORT.decode() in log and status not in (0, LOST)
        self._release(self._program.encode() if aborted or status == LOST else b"")
        if status and sys.stderr.isatty():
            self._write(b"\x1b[?25h")  # show the cursor that the live line hides
        if aborted:
            self._say(f"{lost_process(log)}; {how_to_resume()}")
        return LOST if aborted else status

    def _release(self, start: bytes) -> None:
        for line in self._held:
            if line.startswith(start):
                self._write(line)
        self._held = []

    def _write(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # stderr is closed
            sys.stderr.buffer.write(text)
            sys.stderr.flush()

    def _say(self, line: str) -> None:
        self._write(f"{self._program}: {line}\n".encode())

    def _pass_on(self, signum: int, _frame: FrameType | None) -> None:
        self._signum = signum
        if self._child is not None:
            self._child.send_signal(signum)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._signum is None and time.monotonic() < end:
            time.sleep(0.1)
