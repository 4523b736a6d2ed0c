"""Measurements in fresh processes: starts, and the memory of a step."""

import os

import jax
import pytest
from pretraining import options

from slm_jax.errors import InputError
from slm_jax.tasks.config import parse_args
from slm_jax.tools.bench import step_memory
from slm_jax.tools.bench.peak_memory import PeakMemory
from slm_jax.tools.bench.processes import output_of
from slm_jax.tools.bench.startup_time import NAMES
from slm_jax.tools.bench.startup_time import measure as measure_startup


def test_a_process_uses_this_slm_jax_and_reports_why_it_fails():
    assert output_of(["-c", "import slm_jax.errors as e; print(e.InputError.__name__)"]) == "InputError\n"
    with pytest.raises(InputError, match=r"ended with status 2: too bad$"):
        output_of(["-c", "import sys; print('first\\ntoo bad', file=sys.stderr); sys.exit(2)"])
    with pytest.raises(RuntimeError, match="NameError"):
        output_of(["-c", "nothing"])


@pytest.mark.slow
def test_starts_are_measured_and_leave_nothing(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before, words = dict(os.environ), options(text_file, tmp_path, sample__every=0, train__accumulate=1)
    figures = measure_startup(parse_args(words), repeats=1).figures
    median = {key: figures[f"{key}_seconds"]["median"] for key in NAMES}
    assert min(median.values()) > 0
    # The bare import imports nothing of its own; a start includes the imports, and far more.
    assert median["first_use_slm_jax"] > median["import_slm_jax"]
    assert median["first_step_warm_cache"] > median["import_jax_flax"]
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before


def test_a_run_that_does_not_start_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("slm_jax.tools.bench.startup_time.output_of", lambda _: "[1.0, 0.1, 0.2]")
    config = parse_args(["--data.source", f"text:{tmp_path}/none.txt"])
    with pytest.raises(InputError, match=r"ended with status 2: slm-jax train: .*none\.txt"):
        measure_startup(config, repeats=1)


@pytest.mark.slow
def test_memory_is_planned_analysed_and_measured(text_file, tmp_path):
    config = parse_args(options(text_file, tmp_path, model__emb_dim=64, model__vocab_size=20_000))
    figures = step_memory.measure(config).figures
    assert figures["least_bytes"] > 3 * 4 * 20_000 * 64
    assert figures["planned_bytes"] > figures["least_bytes"]
    assert figures["xla_bytes"] > figures["least_bytes"]
    if figures["measured_bytes"] is None:
        pytest.skip("the system does not report the memory of a process")
    assert figures["least_bytes"] < figures["measured_bytes"] < 3 * figures["xla_bytes"] + 50e6


def test_an_accelerator_without_a_data_sheet_is_not_planned_as_a_cpu(monkeypatch):
    monkeypatch.setattr(step_memory, "device_here", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert step_memory.plan_here(parse_args([])) is None


def test_memory_without_a_plan_is_analysed_and_measured(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(step_memory, "plan_here", lambda _: None)
    peak = PeakMemory()
    peak.n_bytes = 2_000_000
    monkeypatch.setattr(step_memory, "peak_of_a_process", lambda _: peak)
    result = step_memory.measure(parse_args(options(text_file, tmp_path, train__accumulate=1)))
    assert result.rows["planned (slm-jax plan)"] == "unknown"
    assert result.bars.keys() == {"XLA", "measured"}
    assert result.figures["planned_bytes"] is None
    result.to_json()
