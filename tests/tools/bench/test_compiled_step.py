"""Measured training steps: the step is that of train, and the arithmetic of its figures is right."""

import dataclasses
import itertools
import math

import pytest
from pretraining import options

from slm_jax import cli
from slm_jax.errors import InputError
from slm_jax.tasks.config import RunConfig, parse_args
from slm_jax.tools.bench.ceilings import Ceilings
from slm_jax.tools.bench.compiled_step import CompiledStep, StepTimer, compile_step, with_known_vocabulary
from slm_jax.tools.bench.step_speed import measure, speed_figures
from slm_jax.training.program import Program, device_bytes

WORDS = [
    *("--model.vocab_size", "64", "--model.context_length", "16", "--model.n_layers", "1", "--model.emb_dim", "32"),
    *("--model.n_heads", "2", "--train.batch_size", "8", "--model.dtype", "float32", "--tokenizer.kind", "char"),
]


def config_of(*words: str) -> RunConfig:
    return parse_args([*WORDS, *words])


@pytest.fixture(scope="module")
def step() -> CompiledStep:
    return compile_step(config_of())


def test_it_is_the_step_that_train_compiles(text_file, tmp_path, monkeypatch):
    compiled = []

    def keep(program):
        compiled.append(program.compiling[0].result())
        raise InputError("seen enough")

    words = options(text_file, tmp_path, train__accumulate=1)
    with monkeypatch.context() as patch:
        patch.setattr(Program, "wait", keep)
        assert cli.main(["train", *words]) == 2
    config, notes = with_known_vocabulary(parse_args(words))
    ours = compile_step(config)
    assert "counted in the text" in notes[0]
    assert ours.compiled.cost_analysis() == compiled[0].cost_analysis()
    assert ours.compiled.memory_analysis().temp_size_in_bytes == compiled[0].memory_analysis().temp_size_in_bytes
    assert ours.planned_bytes == device_bytes(compiled[0])


def test_mfu_is_the_formula_by_hand(step):
    # 64·32 embedding; 32·96+96, 32·32+32, 32·128+128, 128·32+32 in the block; three norms of 2·32
    n = 2048 + 3168 + 1056 + 4224 + 4128 + 3 * 64
    figures = speed_figures(step, 0.01, Ceilings(1e10, 1e9, "given"))
    assert step.tokens == 8 * 16
    assert figures["flops_per_token"] == 6 * n + 12 * 1 * 32 * 16 == 95_040
    assert math.isclose(figures["tokens_per_second"], 12_800)
    assert math.isclose(figures["mfu"], 12_800 * 95_040 / 1e10 / step.mesh.size)
    assert math.isclose(figures["bounds_seconds"]["arithmetic"], 128 * 95_040 / 1e10 / step.mesh.size)


def test_the_memory_bound_is_the_state_read_and_written_once(step):
    n_bytes = 3 * 4 * (14_816 + 16 * 32)  # parameters and two moments in float32, position embeddings too
    assert step.moved_bytes is not None
    assert 2 * n_bytes <= step.moved_bytes < 2 * n_bytes * 1.1 + 3 * 4 * step.tokens


def test_without_a_peak_there_is_no_mfu(step):
    figures = speed_figures(step, 0.01, Ceilings(None, None, "unknown"))
    assert figures["mfu"] is None
    assert figures["bounds_seconds"] == {}
    part = dataclasses.replace(step, flops_per_token=None)
    assert speed_figures(part, 0.01, Ceilings(1e10, None, ""))["flops_per_second"] is None


def test_queued_steps_are_timed_from_one_reading_to_the_next(step):
    ticks = itertools.accumulate(itertools.count(1))  # 1, 3, 6, 10, 15 …
    timer = StepTimer(step, clock=lambda: float(next(ticks)))
    assert timer.queue(4).seconds == (2.0, 3.0, 4.0, 5.0)
    assert 3 < timer.loss < 5  # of 64 ids: log(64) = 4.16
    before = timer.loss
    timer.step_and_wait()
    assert timer.loss != before


def test_a_packed_batch_has_documents(step):
    packed = compile_step(config_of("--data.packing", "true"))
    assert packed.batch.keys() == {"inputs", "targets", "weights", "segment_ids", "positions"}
    assert packed.batch["segment_ids"][0].tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert packed.batch["positions"][0].tolist() == [0, 1, 2, 3] * 4
    assert (step.batch["inputs"][:, 1:] == step.batch["targets"][:, :-1]).all()


def test_all_figures_are_there(monkeypatch):
    monkeypatch.setattr("slm_jax.tools.bench.ceilings._SECONDS", 0.01)
    result = measure(config_of("--data.source", "text:nowhere"), warmup=1, repeats=3, peak=1e12)
    figures = result.figures
    assert len(figures["step_seconds"]["repeats"]) == len(figures["queued_step_seconds"]["repeats"]) == 3
    assert figures["loss_finite"]
    assert figures["compile_seconds"] > 0
    assert 0 < figures["mfu"] < 1
    assert figures["tokens_per_second"] == 128 / figures["queued_step_seconds"]["median"]
    assert result.bars.keys() == {"step, waited for", "step, queued"}
