"""Measured batches and measured generation."""

import functools
import itertools
import math

import jax
import pytest
from pretraining import options

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, init_params
from slm_jax.tasks.config import parse_args
from slm_jax.tools.bench.batch_speed import measure, per_batch
from slm_jax.tools.bench.ceilings import Ceilings
from slm_jax.tools.bench.decode_speed import bench_generate, bytes_per_step, time_generation

CFG = GPTConfig(vocab_size=50, context_length=24, emb_dim=16, n_heads=2, n_layers=2)


@pytest.fixture(scope="module")
def params():
    return jax.jit(functools.partial(init_params, CFG))(jax.random.key(0))


def test_batches_are_timed_several_at_once():
    ticks = itertools.count(step=5)
    batches = iter(range(100))
    timing = per_batch(batches, warmup=1, repeats=3, batches=10, clock=lambda: float(next(ticks)))
    assert timing.seconds == (0.5, 0.5, 0.5)
    assert next(batches) == 40


def test_the_batches_of_a_run_are_measured(text_file, tmp_path):
    config = parse_args(options(text_file, tmp_path))
    result = measure(config, warmup=0, repeats=2, batches=3, step_ms=20.0)
    figures = result.figures
    assert figures["tokens_per_batch"] == 8 * 16
    assert figures["bytes_per_batch"] == 3 * 4 * 8 * 16
    assert math.isclose(figures["tokens_per_second"], 8 * 16 / figures["batch_seconds"]["median"])
    assert math.isclose(figures["share_of_step"], figures["batch_seconds"]["median"] / 0.02)
    assert "a training step" in result.bars
    assert list(tmp_path.iterdir()) == []  # no run is begun


def test_further_tokens_are_what_remains_without_the_first(params):
    times = iter([0.0, 9.0, 10.0, 90.0, 100.0, 101.0, 101.0, 109.0, 200.0, 203.0, 203.0, 217.0])
    prefill, decode = time_generation(CFG, params, 1, 5, 4, warmup=1, repeats=2, clock=lambda: next(times))
    assert prefill.seconds == (1.0, 3.0)
    assert decode.seconds == (2.0, 4.0)


def test_what_a_token_reads(params):
    weights = sum(leaf.nbytes for name, tree in params.items() if name != "pos_emb" for leaf in jax.tree.leaves(tree))
    assert bytes_per_step(CFG, params, 0) == weights
    assert bytes_per_step(CFG, params, 10) == weights + 10 * 2 * 2 * 16 * 4  # keys and values, layers, width, float32


def test_each_batch_size_is_measured(params):
    result = bench_generate(
        CFG, params, Ceilings(None, 1e9, "given"),
        batch_sizes=(1, 3), prompt_tokens=5, new_tokens=6, warmup=1, repeats=2,
    )  # fmt: skip
    first, second = result.figures["cases"]
    assert (first["batch_size"], second["batch_size"]) == (1, 3)
    assert math.isclose(second["prefill_tokens_per_second"], 15 / second["prefill_seconds"]["median"])
    assert math.isclose(second["decode_tokens_per_second"], 3 / second["decode_step_seconds"]["median"])
    assert first["decode_bounds_seconds"] == {"memory": bytes_per_step(CFG, params, 8) / 1e9}
    assert {"batch 1: least, bytes over bandwidth", "batch 3: least, bytes over bandwidth"} <= result.rows.keys()
    assert math.isclose(
        first["bandwidth_share"], first["decode_bounds_seconds"]["memory"] / first["decode_step_seconds"]["median"]
    )


def test_more_tokens_than_the_context_are_refused(params):
    with pytest.raises(InputError, match="prompt_tokens 20 and new_tokens 5 are more than the model's context of 24"):
        bench_generate(
            CFG, params, Ceilings(None, None, ""),
            batch_sizes=(1,), prompt_tokens=20, new_tokens=5, warmup=1, repeats=1,
        )  # fmt: skip
