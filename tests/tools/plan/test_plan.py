"""A plan: the changes that it suggests fit, what it says fits is the most, and its figures can be counted."""

import functools
import shlex

import pytest

from slm_jax.data.token_file import json_path, write_token_file
from slm_jax.errors import InputError
from slm_jax.tasks.config import FinetuneConfig, RunConfig, parse_args
from slm_jax.tokenizer import CharTokenizer
from slm_jax.tools.plan import estimate, make_plan
from slm_jax.tools.plan.estimate import ASSUMED_MFU

GPT2 = ("--model.preset", "gpt2-small", "--tokenizer.kind", "gpt2")


def config(*words):
    return parse_args([*GPT2, *words])


def test_gpt2_small_on_a_t4():
    """Parameters and FLOPs as published; float32, as bfloat16 is only emulated there."""
    plan = make_plan(config("--train.batch_size", "2", "--train.steps", "100"), "t4")
    assert plan.n_params == plan.n_trained == 124_439_808
    assert (plan.dtype, plan.attention) == ("float32", "xla")
    assert plan.flops_per_token == 6 * (124_439_808 - 786_432) + 12 * 12 * 768 * 1024
    assert plan.tokens_per_second == pytest.approx(8.1e12 * ASSUMED_MFU / plan.flops_per_token)
    assert plan.tokens == 100 * 2 * 1024
    assert plan.hours == pytest.approx(plan.tokens / plan.tokens_per_second / 3600)
    assert plan.by_remat["none"].memory.parameters == 4 * 124_439_808
    assert plan.by_remat["none"].memory.optimizer == 8 * 124_439_808


@pytest.mark.parametrize(
    ("words", "device", "n_devices"),
    [
        (["--train.batch_size", "64"], "t4", 1),
        (["--train.batch_size", "256"], "v5e", 4),
        (["--train.batch_size", "64", "--train.eval_batch_size", "8192"], "h100", 1),
        pytest.param(["--train.batch_size", "64", "--model.preset", "gpt2-xl"], "a100-40g", 8, marks=pytest.mark.slow),
        (["--train.batch_size", "64", "--model.preset", "gpt2-xl", "--mesh.replica", "2"], "a100-40g", 16),
    ],
)
def test_every_suggested_change_makes_it_fit(words, device, n_devices):
    plan = make_plan(config(*words), device, n_devices)
    assert not plan.fits
    assert plan.changes
    for change in plan.changes:
        assert make_plan(config(*words, *shlex.split(change)), device, n_devices).fits, change
    hopeless = make_plan(config("--model.preset", "gpt2-xl"), "t4")
    assert (hopeless.fits, hopeless.changes) == (False, ())


def test_dtype_and_attention_are_those_of_the_device():
    for device, *expected in (
        ("h100", "bfloat16", "cudnn"),
        ("v5e", "bfloat16", "flash"),
        ("v100", "float32", "xla"),
        ("cpu", "float32", "explicit"),
    ):
        plan = make_plan(config(), device)
        assert [plan.dtype, plan.attention] == expected
    words = ["--model.attention", "cudnn"]  # which only the device has
    assert make_plan(config(*words, "--task", "classification"), "h100").attention == "cudnn"
    with pytest.raises(InputError, match="'cudnn' cannot be used"):
        make_plan(config(*words), "v5e")


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("accumulate", [1, pytest.param(32, marks=pytest.mark.slow)])
def test_the_largest_number_of_rows_fits_and_one_more_does_not(remat, accumulate):
    def fit(rows):
        words = ("--train.batch_size", str(accumulate * rows), "--train.accumulate", str(accumulate))
        return make_plan(config(*words), "a100-40g").by_remat[remat]

    most = fit(1).largest_rows
    assert [fit(rows).fits for rows in (most, most + 1)] == [True, False]


def test_the_accumulation_is_the_smallest_that_fits_and_recomputing_more_takes_less():
    words = ["--train.batch_size", "64"]
    by_remat = make_plan(config(*words), "v5e").by_remat
    totals = [fit.memory.total for fit in by_remat.values()]
    assert totals == sorted(totals, reverse=True)
    least = by_remat["none"].accumulate
    for accumulate, fits in ((least // 2, False), (least, True)):
        assert make_plan(config(*words, "--train.accumulate", str(accumulate)), "v5e").by_remat["none"].fits == fits


def test_devices_share_the_batch_and_with_fsdp_the_state():
    words = ["--train.batch_size", "8"]
    one, four = make_plan(config(*words), "v5e"), make_plan(config(*words, "--mesh.fsdp", "4"), "v5e", 4)
    assert four.rows == 2
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
    memory = four.by_remat["none"].memory
    assert memory.optimizer == pytest.approx(one.by_remat["none"].memory.optimizer / 4, rel=0.01)


def test_it_shows_how_parameters_are_split_and_says_that_heads_are_not():
    words = ["--tokenizer.kind", "gpt2", "--mesh.fsdp", "2", "--mesh.tensor"]
    shares = {share.path: share for share in make_plan(parse_args([*words, "4"]), "v5e", 8).shares}
    query, embedding = shares["blocks/attn/q/kernel"], shares["tok_emb/embedding"]
    assert (query.split, query.n_bytes) == ({"embed": "fsdp", "heads": "tensor"}, 4 * 4 * 128 * 128 / 8)
    assert (embedding.split, embedding.n_bytes) == ({"embed": "fsdp"}, 4 * 50_257 * 128 / 2)  # 50,257 is odd
    assert shares["final_norm/scale"].split == {}
    plan = make_plan(parse_args([*words, "3"]), "v5e", 6)
    assert any("mesh.tensor is 3, which does not divide the model's 4 heads" in note for note in plan.notes)
    shares = {share.path: share for share in plan.shares}
    for wider in ("attn/q", "ff/fc"):  # the width of the stream, not the larger axis beside it
        assert shares[f"blocks/{wider}/kernel"].split == {"embed": "fsdp"}


def test_given_tokens_and_mfu_and_a_cpu_that_has_memory_but_no_speed():
    plan = make_plan(config(), "h100", mfu=0.5, tokens=1e9)
    assert plan.tokens == 1e9
    assert plan.hours == pytest.approx(1e9 * plan.flops_per_token / (0.5 * 989e12) / 3600)
    with pytest.raises(InputError, match="mfu"):
        make_plan(RunConfig(), "cpu", mfu=0.4)
    plan = make_plan(config(), "cpu")
    assert plan.memory_limit > 2**20
    assert (plan.tokens_per_second, plan.hours, plan.xla_bytes) == (None, None, None)


def test_a_small_model_on_a_cpu_is_compiled():
    shape = {"n_layers": 1, "emb_dim": 32, "n_heads": 2, "context_length": 16, "vocab_size": 64}
    words = [word for key, value in shape.items() for word in (f"--model.{key}", str(value))]
    for task in ("pretraining", "classification", "instruction"):
        plan = make_plan(parse_args([*words, "--task", task, "--tokenizer.kind", "char"]), "cpu")
        least = plan.by_remat["none"].memory
        assert least.parameters + least.optimizer < plan.xla_bytes < 3 * least.total


def test_what_xla_says_of_compiled_programs_decides_and_not_the_formulas(monkeypatch):
    words = ["--model.n_layers", "1", "--model.emb_dim", "32", "--model.n_heads", "2", "--tokenizer.kind", "char"]
    for compiled, formula, fits in ((1e6, 1e30, True), (1e30, 1e6, False), (0, 1e30, False)):
        monkeypatch.setattr(estimate, "compiled_bytes", lambda *_, found=compiled: found)
        monkeypatch.setattr(estimate, "evaluation_memory", lambda *_, found=formula: found)
        plan = make_plan(parse_args(words), "cpu")
        assert plan.fits == fits
        assert "" not in plan.changes


def test_the_model_of_a_base_follows_from_its_name():
    plan = make_plan(FinetuneConfig(base="smollm2-135m-instruct", trainable="lora"), "h100")
    assert plan.n_params - plan.n_trained > 134_515_008 - 576 * 2
    assert plan.n_trained < 3_000_000


def test_fine_tuning_a_part_needs_less_than_all():
    """Named weights need not be there: their shape is known."""
    parts = {
        trainable: make_plan(FinetuneConfig(base="gpt2", trainable=trainable), "t4").by_remat["none"].memory
        for trainable in ("all", "last_block", "lora")
    }
    assert parts["last_block"].parameters == parts["all"].parameters
    assert parts["last_block"].optimizer < parts["all"].optimizer / 10
    assert parts["last_block"].activations == pytest.approx(parts["all"].activations / 12)
    assert parts["lora"].gradients < parts["last_block"].gradients


@pytest.mark.parametrize(
    ("words", "vocab_size", "note"),
    [
        (["--tokenizer.kind", "char", "--data.source", "text:nowhere/*.txt"], 4096, "assumed: 4,096 token ids"),
        (["--tokenizer.vocab_size", "1000"], 1000, None),
        (["--data.source", "tokens:to-come.bin"], 50_257, "50,257"),  # what prepare writes by default
    ],
)
def test_a_vocabulary_that_is_not_there_yet_is_assumed(words, vocab_size, note):
    plan = make_plan(parse_args(words), "t4")
    assert plan.vocab_size == vocab_size
    assert note is None or any(note in line for line in plan.notes)


def test_a_token_file_has_the_vocabulary_and_a_damaged_description_is_refused(tmp_path):
    path = tmp_path / "ids.bin"
    tokenizer = CharTokenizer().build_vocab("a bad cafe")
    with write_token_file(path, tokenizer, "a test"):
        pass
    plan_of = functools.partial(make_plan, parse_args(["--data.source", f"tokens:{path}"]), "t4")
    assert plan_of().vocab_size == tokenizer.vocab_size
    json_path(path).write_text(json_path(path).read_text().replace('"vocab_size": ', '"vocab_size": "many", "was": '))
    with pytest.raises(InputError, match=r"ids\.bin\.json: vocab_size: expected .int."):
        plan_of()


@pytest.mark.parametrize(
    ("words", "n_devices", "message"),
    [
        (["--mesh.fsdp", "3"], 4, "expected a divisor of the 4 device"),
        (["--base", "nowhere/weights"], 1, "base nowhere/weights is no existing run"),
        (["--base", "gpt2", "--model.n_layers", "3"], 1, r"model\.n_layers is 3.* 12"),
    ],
)
def test_what_cannot_run_is_refused(words, n_devices, message):
    with pytest.raises(InputError, match=message):
        make_plan(parse_args(words), "h100", n_devices)


@pytest.mark.parametrize("task", ["classification", "instruction"])
def test_longer_texts_than_the_context_are_refused(task):
    words = ["--task", task, "--base", "gpt2", f"--{task}.max_length", "1025"]
    with pytest.raises(InputError, match=rf"{task}\.max_length is 1025.* 1024"):
        make_plan(parse_args(words), "h100")
