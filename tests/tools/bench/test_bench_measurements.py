"""Measurements: the step is that of train, and the arithmetic of all figures is right."""

import dataclasses
import itertools
import json
import math

import jax
import pytest
from pretraining import options

from slm_jax import cli
from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, param_shapes
from slm_jax.tasks.config import RunConfig, parse_args
from slm_jax.tools.bench import generation, instruments, training
from slm_jax.tools.bench.generation import measure_generation, time_generation
from slm_jax.tools.bench.instruments import Ceilings, PeakMemory
from slm_jax.tools.bench.training import compile_step, measure_memory, measure_startup, measure_step, speed_figures
from slm_jax.training.config import ModelConfig
from slm_jax.training.program import Program, device_bytes

WORDS = [
    *("--model.vocab_size", "64", "--model.context_length", "16", "--model.n_layers", "1", "--model.emb_dim", "32"),
    *("--model.n_heads", "2", "--train.batch_size", "8", "--model.dtype", "float32", "--tokenizer.kind", "char"),
]
CFG = GPTConfig(vocab_size=64, context_length=24, emb_dim=16, n_heads=2, n_layers=2)


def config_of(*words: str) -> RunConfig:
    return parse_args([*WORDS, *words])


@pytest.fixture(scope="module")
def step() -> training.CompiledStep:
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
    config, notes = training.with_known_vocabulary(parse_args(words))
    ours = compile_step(config)
    assert "counted in the text" in notes[0]
    assert ours.compiled.cost_analysis() == compiled[0].cost_analysis()
    assert ours.compiled.memory_analysis().temp_size_in_bytes == compiled[0].memory_analysis().temp_size_in_bytes
    assert device_bytes(ours.compiled) == device_bytes(compiled[0])


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
    timer = training.StepTimer(step, clock=lambda: float(next(ticks)))
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


def test_all_figures_of_a_step_are_there(monkeypatch):
    monkeypatch.setattr(instruments, "_SECONDS", 0.01)
    result = measure_step(config_of("--data.source", "text:nowhere"), warmup=1, repeats=3, peak=1e12)
    figures = result.figures
    assert len(figures["step_seconds"].seconds) == len(figures["queued_step_seconds"].seconds) == 3
    assert figures["loss_finite"]
    assert figures["compile_seconds"] > 0
    assert 0 < figures["mfu"] < 1
    assert figures["tokens_per_second"] == 128 / figures["queued_step_seconds"].median
    with pytest.raises(InputError, match="expected one of h200"):
        measure_step(config_of(), warmup=1, repeats=3, device="h20")


@pytest.mark.slow
def test_memory_is_planned_analysed_and_measured(text_file, tmp_path):
    words = options(text_file, tmp_path, model__emb_dim=64, model__vocab_size=20_000)
    figures = measure_memory(parse_args(words)).figures
    assert figures["least_bytes"] > 3 * 4 * 20_000 * 64
    assert figures["planned_bytes"] > figures["least_bytes"]
    assert figures["xla_bytes"] > figures["least_bytes"]
    if figures["measured_bytes"] is None:
        pytest.skip("the system does not report the memory of a process")
    assert figures["least_bytes"] < figures["measured_bytes"] < 3 * figures["xla_bytes"] + 50e6


def test_an_accelerator_without_a_data_sheet_is_analysed_and_measured_and_not_planned_as_a_cpu(monkeypatch):
    monkeypatch.setattr(training, "device_here", lambda: None)
    monkeypatch.setattr(training, "peak_of_a_process", lambda _: PeakMemory(2_000_000, "a process"))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert training.plan_here(config_of()) is None
    monkeypatch.setattr(training, "plan_here", lambda _: None)
    result = measure_memory(config_of())
    assert result.figures["planned_bytes"] is None
    assert json.loads(result.to_json())["figures"]["measured_bytes"] == 2_000_000
    assert ("planned (slm-jax plan)", None, "unknown") in result.shown()


def test_batches_are_timed_several_at_once():
    ticks = itertools.count(step=5)
    batches = iter(range(100))
    timing = training.per_batch(batches, warmup=1, repeats=3, batches=10, clock=lambda: float(next(ticks)))
    assert timing.seconds == (0.5, 0.5, 0.5)
    assert next(batches) == 40


def test_the_batches_of_a_run_are_measured(text_file, tmp_path):
    config = parse_args(options(text_file, tmp_path))
    figures = training.measure_batches(config, warmup=0, repeats=2, batches=3, step_ms=20.0).figures
    assert figures["tokens_per_batch"] == 8 * 16
    assert figures["bytes_per_batch"] == 3 * 4 * 8 * 16
    assert math.isclose(figures["tokens_per_second"], 8 * 16 / figures["batch_seconds"].median)
    assert math.isclose(figures["share_of_step"], figures["batch_seconds"].median / 0.02)
    assert list(tmp_path.iterdir()) == []  # no run is begun


def test_further_tokens_are_what_remains_without_the_first(monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *_, **__: 0)
    times = iter([0.0, 9.0, 10.0, 90.0, 100.0, 101.0, 101.0, 109.0, 200.0, 203.0, 203.0, 217.0])
    prefill, decode = time_generation(CFG, {}, 1, 5, 4, warmup=1, repeats=2, clock=lambda: next(times))
    assert prefill.seconds == (1.0, 3.0)
    assert decode.seconds == (2.0, 4.0)


def test_each_batch_size_is_measured_and_what_a_token_reads(monkeypatch):
    monkeypatch.setattr(generation, "find_ceilings", lambda *_: Ceilings(None, 1e9, "given"))
    shape = ModelConfig(vocab_size=64, context_length=24, emb_dim=16, n_heads=2, n_layers=2, dtype="float32")
    of = {"run": None, "model": shape, "warmup": 1, "repeats": 2}
    result = measure_generation(batch_sizes="1,3", prompt_tokens=5, new_tokens=6, **of)
    first, second = result.figures["cases"]
    assert (first["batch_size"], second["batch_size"]) == (1, 3)
    assert math.isclose(second["prefill_tokens_per_second"], 15 / second["prefill_seconds"].median)
    assert math.isclose(second["decode_tokens_per_second"], 3 / second["decode_step_seconds"].median)
    assert {"batch 1: each token after", "batch 3: least time of a token"} <= {name for name, *_ in result.shown()}
    bound = first["decode_bounds_seconds"]["memory"]
    assert math.isclose(first["bandwidth_share"], bound / first["decode_step_seconds"].median)
    # Weights but for positions, which are looked up; of 8 tokens seen on average keys, values, layers, width, float32.
    params = param_shapes(CFG)
    weights = 4 * sum(leaf.size for name, tree in params.items() if name != "pos_emb" for leaf in jax.tree.leaves(tree))
    assert first["bytes_per_step"] == weights + 8 * 2 * 2 * 16 * 4
    assert bound == first["bytes_per_step"] / 1e9
    with pytest.raises(InputError, match="prompt_tokens 20 and new_tokens 5 are more than the model's context of 24"):
        measure_generation(batch_sizes="1", prompt_tokens=20, new_tokens=5, **of)


@pytest.mark.slow
def test_starts_are_measured_and_leave_nothing(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = options(text_file, tmp_path, sample__every=0, train__accumulate=1)
    figures = measure_startup(parse_args(words), repeats=1).figures
    median = {name: figures[name].median for name in training.STARTUP}
    assert min(median.values()) > 0
    # The bare import imports nothing of its own; a start includes the imports, and far more.
    assert median["first_use_slm_jax_seconds"] > median["import_slm_jax_seconds"]
    assert median["first_step_warm_cache_seconds"] > median["import_jax_flax_seconds"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_start_is_reported(tmp_path):
    config = parse_args(["--data.source", f"text:{tmp_path}/none.txt"])
    with pytest.raises(InputError, match=r"ended with status 2: slm-jax train: .*none\.txt"):
        measure_startup(config, repeats=1)
