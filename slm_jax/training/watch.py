"""The processes of a job watch each other: if one dies, hangs or fails, the others end with one line.

Every process writes a heartbeat to the key-value store of JAX's coordination service, which process 0 hosts. Process 0
looks for processes without one and tells the others, which notice themselves if process 0 does not answer.
"""

import contextlib
import functools
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed

from slm_jax.errors import InputError
from slm_jax.training.distributed import initialize_distributed
from slm_jax.training.process import LOST, Interrupted, end_now
from slm_jax.training.record import TrainingDiverged
from slm_jax.training.supervisor import how_to_resume

BEAT = 2.0  # seconds between two heartbeats
SILENCE = 30.0  # seconds without a heartbeat after which a process counts as lost
SUSPICION = 8.0  # the same after an operation with the other processes has failed here
_ALIVE, _LOST = "slm_jax/alive", "slm_jax/lost"
_DONE = "done"
_STATUS = re.compile(r"[A-Z_]+: ")  # start of XLA's errors of any class, such as failed operations with others


@contextlib.contextmanager
def joined(program: str, timeout: int) -> Iterator[None]:
    """Join the other processes of a job, if there are any, within ``timeout`` seconds, and watch them.

    If one is missing, JAX aborts the process, and the supervisor reports why. Messages begin with ``program``.
    """
    with _registering(timeout - 8):
        several = initialize_distributed(timeout=timeout - 5)  # JAX adds 5 s
    state = distributed.global_state  # the key-value store has no public name
    if not several or state.num_processes == 1:
        yield
        return
    with Watch(program, state.client, state.process_id, state.num_processes):
        yield


@contextlib.contextmanager
def _registering(timeout: int) -> Iterator[None]:
    """Let the coordination service time out first: it knows which processes are missing, and names them."""
    library = getattr(distributed, "_jax", None)
    name = "get_distributed_runtime_service"
    if (make := getattr(library, name, None)) is None:
        yield
        return
    setattr(library, name, functools.partial(make, cluster_register_timeout=timeout))
    try:
        yield
    finally:
        setattr(library, name, make)


class Watch:
    """A context manager that ends this process with status 75 if another is lost, and reports its error to the others.

    Args:
        program: start of its messages, such as ``slm-jax train``.
        client: client of JAX's coordination service.
        index: index of this process.
        count: number of processes.
    """

    def __init__(self, program: str, client: Any, index: int, count: int):
        self._program, self._client, self._index, self._count = program, client, index, count
        self._stopped, self._patience = threading.Event(), SILENCE
        self._answered = time.monotonic()  # when the coordination service last answered
        self._hosts: dict[int, str] = {}
        self._seen = dict.fromkeys(range(count), ("", self._answered))  # last heartbeat, and when it changed

    def __enter__(self) -> "Watch":
        for target in (self._beat, self._watch_coordinator):
            threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, Interrupted | TrainingDiverged):  # all end alike
            self._stopped.set()
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._set(f"{_ALIVE}/{self._index}", _DONE)
            return
        expected = isinstance(error, InputError | OSError)
        if not expected and _STATUS.match(str(error)):  # if another process is the cause, the watch ends this one
            self._patience = SUSPICION
            time.sleep(SILENCE + 3 * BEAT)
        self._stopped.set()
        reason = " ".join(f"{error if expected else type(error).__name__}".split())
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._set(f"{_LOST}/{self._index}", f"{self._name(self._index)} failed: {reason}")
        if expected:
            print(f"{self._program}: {reason}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # until the others have read it, or failed, too
            self._client.wait_at_barrier(f"{_LOST}/all", int(3000 * BEAT))
        end_now(2 if isinstance(error, InputError) else LOST)

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(key, value, allow_overwrite=True)

    def _beat(self) -> None:
        """Write heartbeats, read which processes are lost, and on process 0 look for lost ones."""
        number, host = 0, socket.gethostname()
        while not self._stopped.is_set():
            try:
                self._set(f"{_ALIVE}/{self._index}", f"{number} {host}")
                for _, problem in self._client.key_value_dir_get(_LOST):
                    self._end(problem)
                if self._index == 0:
                    self._judge(self._client.key_value_dir_get(_ALIVE))
                elif 0 not in self._hosts:
                    self._read_hosts(self._client.key_value_dir_get(_ALIVE))
            except jax.errors.JaxRuntimeError:
                self._end(f"{self._name(0)} died")
            self._answered = time.monotonic()
            number += 1
            self._stopped.wait(BEAT)

    def _judge(self, signs: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        self._read_hosts(signs)
        for key, sign in signs:
            other = int(key.rpartition("/")[2])
            if sign != self._seen[other][0]:
                self._seen[other] = sign, now
        for other, (sign, when) in self._seen.items():
            if sign != _DONE and now - when > self._patience:
                problem = f"{self._name(other)} died or hangs: no sign of life for {now - when:.0f} s"
                self._set(f"{_LOST}/{other}", problem)
                time.sleep(2 * BEAT)  # time for the others to read it
                self._end(problem)

    def _read_hosts(self, signs: list[tuple[str, str]]) -> None:
        self._hosts |= {int(key.rpartition("/")[2]): sign.partition(" ")[2] for key, sign in signs if sign != _DONE}

    def _watch_coordinator(self) -> None:
        while not self._stopped.wait(BEAT):
            if time.monotonic() - self._answered > SILENCE:
                self._end(f"{self._name(0)} hangs: no answer for {SILENCE:.0f} s")

    def _name(self, index: int) -> str:
        host = self._hosts.get(index)
        return f"process {index} of {self._count}" + (f" ({host})" if host else "")

    def _end(self, problem: str) -> None:
        if not self._stopped.is_set():
            end_now(LOST, f"{self._program}: {problem}; {how_to_resume()}")
