"""What measurements are made with: what is timed, medians and spread, peaks, processes, the limits of a device."""

import json
import mmap

import numpy as np
import pytest
from rich.console import Console

from slm_jax.errors import InputError
from slm_jax.tools.bench import instruments
from slm_jax.tools.bench.instruments import Ceilings, Timing, find_ceilings, output_of, start_python
from slm_jax.tools.bench.result import Result, draw_result, print_result
from slm_jax.training.hardware import find_device


def test_only_the_repeats_are_timed():
    now = [0.0]
    durations = iter([100.0, 50.0, 3.0, 1.0, 2.0, 10.0])

    def run() -> None:
        now[0] += next(durations)

    timing = instruments.time_calls(run, warmup=2, repeats=4, clock=lambda: now[0])
    assert timing.seconds == (3.0, 1.0, 2.0, 10.0)
    assert timing.median == 2.5
    assert timing.quartiles == (1.75, 4.75)
    assert timing.to_dict()["range"] == (1.0, 10.0)
    assert str(timing) == "2.5 s (1.75-4.75; 1-10)"
    assert str(Timing((0.0123,))) == "12.3 ms"


def test_bounds_are_of_what_is_known():
    known = Ceilings(100.0, 10.0, "")
    assert known.bounds(500.0, 20.0) == {"arithmetic": 5.0, "memory": 2.0}
    assert known.bounds(None, 20.0) == {"memory": 2.0}
    assert Ceilings(None, None, "").bounds(500.0, 20.0) == {}


def test_ceilings_come_from_the_data_sheet_or_as_given():
    assert find_ceilings("bfloat16", "h200", None).flops == 989e12
    assert find_ceilings("float32", "h200", None).flops == 495e12
    given = find_ceilings("bfloat16", "h200", 5e12)
    assert (given.flops, given.bandwidth) == (5e12, 4.8e12)
    assert find_ceilings("float32", "cpu", None) == Ceilings(None, None, "peak unknown; bandwidth unknown")


def test_the_bandwidth_is_measured_where_no_data_sheet_is_known(monkeypatch):
    monkeypatch.setattr(instruments, "_SECONDS", 0.01)
    monkeypatch.setattr(instruments, "device_here", lambda: None)
    here = find_ceilings("float32", None, None)
    assert (here.flops, here.source) == (None, "peak unknown; bandwidth measured here")
    assert 1e8 < here.bandwidth < 1e15
    measured = find_ceilings("float32", None, "measured")
    assert measured.source == "measured here"
    assert 1e8 < measured.flops < 1e17
    monkeypatch.setattr(instruments, "device_here", lambda: find_device("h200"))
    assert find_ceilings("float32", None, None) == Ceilings(495e12, 4.8e12, "data sheet of h200")


def test_the_peak_is_what_was_held_at_most():
    def touch(megabytes: int) -> None:
        with mmap.mmap(-1, megabytes << 20) as fresh:  # what this process freed before may be handed out again
            np.frombuffer(fresh, np.uint8)[:] = 1

    touch(150)  # before: not counted
    with instruments.peak_memory() as memory:
        touch(60)
    if memory.n_bytes is None:
        pytest.skip("the system does not say what a process holds")
    assert 55e6 < memory.n_bytes < 90e6


def test_a_process_uses_this_slm_jax_and_reports_why_it_fails():
    code = "import slm_jax.errors as e; print(e.InputError.__name__)"
    assert output_of(start_python(["-c", code])) == "InputError\n"
    with pytest.raises(InputError, match=r"ended with status 1: NameError: .*nothing"):
        output_of(start_python(["-c", "nothing"]))


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ({"step_seconds": Timing((0.2, 0.1)), "bounds_seconds": {"memory": 0.01}, "mfu": None}, "150 ms"),
        ({"planned_bytes": 3e6, "xla_bytes": 2_000_000, "measured_bytes": None}, "3.0 MB"),
    ],
)
def test_a_result_is_written_printed_and_drawn(figures, shown, tmp_path, capsys):
    result = Result("train", {"seed": 0}, figures, ("a note",))
    content = json.loads(result.to_json())
    assert content.keys() == {"what", "machine", "config", "figures", "notes"}
    if "step_seconds" in figures:
        assert content["figures"]["step_seconds"]["repeats"] == [0.2, 0.1]
    assert {"device", "devices", "platform", "cores", "threads", "python", "jax", "flax"} <= content["machine"].keys()
    print_result(result, Console())
    printed = capsys.readouterr().out
    assert all(text in printed for text in (shown, "unknown", "a note", content["machine"]["device"]))
    assert ("quartiles" in printed) == ("step_seconds" in figures)
    draw_result(result, tmp_path / "figures.png")
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
