"""What must hold of what is measured in fresh processes."""

import os

import pytest
from pretraining import options

from slm_jax.bench.child import output_of
from slm_jax.bench.memory import bench_memory
from slm_jax.bench.startup import bench_startup
from slm_jax.config import parse_args
from slm_jax.errors import InputError


def test_a_process_uses_this_slm_jax_and_says_why_it_fails():
    assert output_of(["-c", "import slm_jax.errors as e; print(e.InputError.__name__)"]) == "InputError\n"
    with pytest.raises(InputError, match=r"ended with status 2: too bad$"):
        output_of(["-c", "import sys; print('first\\ntoo bad', file=sys.stderr); sys.exit(2)"])
    with pytest.raises(RuntimeError, match="NameError"):
        output_of(["-c", "nothing"])


@pytest.mark.slow
def test_starts_are_measured_and_leave_nothing(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before, words = dict(os.environ), options(text_file, tmp_path, sample__every=0, train__accumulate=1)
    figures = bench_startup(parse_args(words), repeats=1).figures
    assert figures.keys() == {
        "import_jax_flax_seconds",
        "import_slm_jax_seconds",
        "first_step_empty_cache_seconds",
        "first_step_warm_cache_seconds",
    }
    assert all(figure["median"] > 0 for figure in figures.values())
    # It includes the imports, and far more.
    assert figures["first_step_warm_cache_seconds"]["median"] > figures["import_jax_flax_seconds"]["median"]
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before


def test_a_run_that_does_not_start_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("slm_jax.bench.startup.output_of", lambda _: "[1.0, 0.1]")
    config = parse_args(["--data.source", f"text:{tmp_path}/none.txt"])
    with pytest.raises(InputError, match=r"ended with status 2: slm-jax train: .*none\.txt"):
        bench_startup(config, repeats=1)


@pytest.mark.slow
def test_memory_is_planned_told_and_measured(text_file, tmp_path):
    config = parse_args(options(text_file, tmp_path, model__emb_dim=64, model__vocab_size=20_000))
    figures = bench_memory(config).figures
    assert figures["least_bytes"] > 3 * 4 * 20_000 * 64
    assert figures["planned_bytes"] > figures["least_bytes"]
    assert figures["xla_bytes"] > figures["least_bytes"]
    if figures["measured_bytes"] is None:
        pytest.skip("the system does not say what a process holds")
    assert figures["least_bytes"] < figures["measured_bytes"] < 3 * figures["xla_bytes"] + 50e6
