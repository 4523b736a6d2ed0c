"""Processes of a job notice when another one dies, hangs or fails, and end with a line that names it."""

import threading
import time

import jax
import pytest

from slm_jax.errors import InputError
from slm_jax.training import watch
from slm_jax.training.process import LOST, Interrupted
from slm_jax.training.watch import Watch

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
BEAT = 0.03


class Service:
    """The key-value store of JAX's coordination service, which can die or hang."""

    def __init__(self):
        self.values, self.dead, self.resumed = {}, False, threading.Event()
        self.resumed.set()

    def _answer(self):
        self.resumed.wait()
        if self.dead:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection refused")

    def key_value_set(self, key, value, allow_overwrite=False):
        self._answer()
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key):
        self._answer()
        return [(name, value) for name, value in list(self.values.items()) if name.startswith(f"{key}/")]

    def wait_at_barrier(self, name, timeout_in_ms):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")


@pytest.fixture
def ends(monkeypatch):
    """How processes ended, by the program of their watch: exit status and line."""
    found, others = {}, set(threading.enumerate())

    def end_now(status, line=""):
        program, _, problem = line.partition(": ")
        found.setdefault(program, (status, problem))
        raise SystemExit  # ends a thread silently

    monkeypatch.setattr(watch, "end_now", end_now)
    for name, value in {"BEAT": BEAT, "SILENCE": 20 * BEAT, "SUSPICION": 5 * BEAT}.items():
        monkeypatch.setattr(watch, name, value)
    yield found
    for thread in set(threading.enumerate()) - others:  # one that is left would end this process
        thread.join(5)


def wait_for(condition):
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(BEAT)


@pytest.fixture
def job():
    """A service, and the watches of three processes, started."""
    service = Service()
    watches = [Watch(f"train-{index}", service, index, 3) for index in range(3)]
    for each in watches:
        each.__enter__()
    wait_for(lambda: len(service.key_value_dir_get("slm_jax/alive")) == 3)
    yield service, watches
    service.resumed.set()
    for each in watches:
        each._stopped.set()


def test_processes_that_live_and_those_that_are_done_are_left_alone(ends, job):
    _, watches = job
    watches[1].__exit__(None, None, None)
    watches[2].__exit__(Interrupted, Interrupted(15), None)  # all stop together
    time.sleep(30 * BEAT)
    assert not ends


def test_one_that_dies_or_hangs_ends_all_others_which_name_it(ends, job):
    _, watches = job
    watches[2]._stopped.set()
    wait_for(lambda: len(ends) == 2)
    for index in (0, 1):
        status, line = ends[f"train-{index}"]
        assert status == LOST
        assert line.startswith("process 2 of 3 (")
        assert "; start all processes again to resume: slm-jax" in line


def test_the_death_of_process_0_is_noticed_where_the_service_is_gone(ends, job):
    service, watches = job
    watches[0]._stopped.set()
    service.dead = True
    wait_for(lambda: len(ends) == 2)
    assert all(line.startswith("process 0 of 3 (") and "died" in line for _, line in ends.values())


def test_a_process_0_that_hangs_is_noticed_where_the_service_does_not_answer(ends, job):
    service, watches = job
    watches[0]._stopped.set()
    service.resumed.clear()
    wait_for(lambda: len(ends) == 2)
    assert all(line.startswith("process 0 of 3 (") and "hangs" in line for _, line in ends.values())


def test_a_mistake_that_one_process_finds_ends_all_with_its_message(ends, job, capsys):
    _, watches = job
    with pytest.raises(SystemExit):
        watches[1].__exit__(InputError, InputError("text:x.txt: no such file"), None)
    wait_for(lambda: len(ends) == 3)
    assert "train-1: text:x.txt: no such file" in capsys.readouterr().err
    assert ends[""][0] == 2
    for index in (0, 2):
        assert ends[f"train-{index}"][1].startswith("process 1 of 3")
        assert "failed: text:x.txt: no such file" in ends[f"train-{index}"][1]


def test_after_an_operation_failed_the_lost_process_is_found_sooner_and_named(ends, job, monkeypatch):
    _, watches = job
    monkeypatch.setattr(watch, "SILENCE", 100 * BEAT)
    watches[1]._stopped.set()
    threading.Thread(
        target=watches[0].__exit__, args=(None, ValueError("UNKNOWN: Gloo all-reduce failed"), None)
    ).start()
    wait_for(lambda: "train-0" in ends)
    assert ends["train-0"][1].startswith("process 1 of 3")
