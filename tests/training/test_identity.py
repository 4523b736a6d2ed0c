"""What must hold of a run's identity: what may change between two starts of a run, and what makes another run."""

import dataclasses
import json

import pytest

from slm_jax.config import flatten, to_dict
from slm_jax.tasks.config import RunConfig, parse_args
from slm_jax.training.identity import first_difference, identity

# DESIGN.md: model shape, tokenizer, data source, split, seed, task, optimizer, batch …
IDENTITY = {
    *("task", "seed", "train.batch_size"),
    *(f"tokenizer.{field}" for field in ("kind", "vocab_size", "path")),
    *(
        f"data.{name}"
        for name in ("source", "validation_source", "validation_fraction", "sampling", "stride", "shuffle")
    ),
    *(f"optimizer.{name}" for name in ("learning_rate", "schedule", "warmup_steps", "decay_steps", "weight_decay")),
    *(f"optimizer.{name}" for name in ("kind", "final_learning_rate", "beta1", "beta2", "eps", "clip_norm")),
    *(f"model.{name}" for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate")),
    *(f"model.{name}" for name in ("qkv_bias", "tie_weights", "bias", "exact_gelu", "param_dtype")),
    *("base", "base_optimizer", "trainable"),
}
PRETRAINING = {"data.packing", "data.text_column"}
# What else identifies a run of fine-tuning: its test split, and the sections that its kind of training reads.
TEST_SPLIT = {"data.test_source", "data.test_fraction"}
CLASSIFICATION = {
    *(f"classification.{name}" for name in ("text_column", "label_column", "columns", "balance", "split")),
    *(f"classification.{name}" for name in ("group_duplicates", "pooling", "pad_to", "max_length")),
}
INSTRUCTION = {
    f"instruction.{name}" for name in ("template", "split", "mask_prompt", "packing", "too_long", "max_length")
}
LORA = {f"lora.{name}" for name in ("rank", "alpha", "targets", "drop_rate")}
LAST_N_BLOCKS = {"trainable_blocks"}
MUON = {"optimizer.muon_learning_rate"}
# … against train.steps (and epochs), dtype, remat, mesh, cadence, logging, folders.
EXECUTION = {
    *("run", "runs_dir", "resume"),
    *(f"train.{name}" for name in ("steps", "epochs", "accumulate", "eval_every", "eval_batch_size", "log_every")),
    *(f"model.{name}" for name in ("preset", "dtype", "remat", "attention", "unroll")),
    *(f"checkpoint.{name}" for name in ("every", "keep", "mirror")),
    *(f"logging.{name}" for name in ("tensorboard", "wandb", "wandb_project")),
    *(f"mesh.{name}" for name in ("data", "fsdp", "tensor")),
    *(f"sample.{name}" for name in ("every", "prompt", "max_new_tokens", "temperature", "top_k")),
    *("train.profile", "instruction.responses"),
}
# Absent where they have the value that they had before they could be chosen.
LATER = {
    **{"--model.exact_gelu": "true", "--base": "runs/x", "--base_optimizer": "true", "--trainable": "last_block"},
    **{"--data.packing": "true", "--data.text_column": "body", "--optimizer.kind": "muon"},
}


def test_every_key_is_of_one_kind():
    kinds = (IDENTITY, PRETRAINING, TEST_SPLIT, CLASSIFICATION, INSTRUCTION, LORA, LAST_N_BLOCKS, MUON, EXECUTION)
    assert set(flatten(to_dict(RunConfig()))) == set().union(*kinds)
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize(
    ("args", "keys"),
    [
        ({}, PRETRAINING),
        ({"--task": "classification"}, TEST_SPLIT | CLASSIFICATION),
        ({"--task": "instruction"}, TEST_SPLIT | INSTRUCTION),
        ({"--task": "instruction", "--trainable": "lora"}, TEST_SPLIT | INSTRUCTION | LORA),
        ({"--trainable": "last_n_blocks"}, PRETRAINING | LAST_N_BLOCKS),
    ],
    ids=["pretraining", "classification", "instruction", "lora", "last_n_blocks"],
)
def test_a_run_is_identified_by_what_its_kind_of_training_reads(args, keys):
    config = parse_args([part for pair in {**LATER, **args}.items() for part in pair])
    assert set(identity(config, config.gpt_config(1024))) == IDENTITY | MUON | keys


def test_what_a_run_does_not_read_makes_no_other_run_of_it():
    """So that runs from before these sections go on; what it does read makes one."""
    assert identity(RunConfig(), RunConfig().gpt_config(9)).keys() == (IDENTITY) - {key.lstrip("-") for key in LATER}
    for task, other, own in (
        ("classification", "--instruction.packing", "--classification.group_duplicates"),
        ("instruction", "--classification.group_duplicates", "--instruction.packing"),
    ):
        configs = [parse_args(["--task", task, *more]) for more in ([], [other, "true"], [own, "true"], [own, "false"])]
        ids = [identity(config, config.gpt_config(9)) for config in configs]
        assert ids[0] == ids[1]
        assert ids[2] != ids[3]


def test_an_identity_is_as_json_gives_it_back():
    """It is compared with what a checkpoint's metadata say."""
    args = ["--base", "b", "--trainable", "lora", "--task", "classification", "--classification.columns", "a"]
    config = parse_args(args)
    now = identity(config, config.gpt_config(9))
    assert json.loads(json.dumps(now)) == now


def test_identity_holds_the_resolved_model():
    preset = parse_args(["--model.preset", "mini"])
    spelt = ["--model.context_length", "256", "--model.emb_dim", "256", "--model.n_heads", "8", "--model.n_layers", "6"]
    assert identity(preset, preset.gpt_config(500)) == identity(parse_args(spelt), parse_args(spelt).gpt_config(500))


@pytest.mark.parametrize(
    ("args", "difference"),
    [
        (["--seed", "1"], "seed is 1 now and was 0"),
        (["--model.n_layers", "3"], "model.n_layers is 3 now and was 4"),
        (["--train.batch_size", "7"], f"train.batch_size is 7 now and was {RunConfig().train.batch_size}"),
        (["--optimizer.kind", "muon"], "optimizer.kind is 'muon' now and was 'adamw'"),
        (["--optimizer.clip_norm", "null"], "optimizer.clip_norm is None now and was 1.0"),
        (["--data.source", "text:a.txt"], "data.source is 'text:a.txt' now and was 'builtin:python-docs'"),
        (["--train.steps", "5", "--run", "b", "--model.remat", "full", "--checkpoint.every", "3"], None),
        (["--data.packing", "true"], "data.packing is True now and was False"),
        (["--mesh.fsdp", "2", "--sample.prompt", "x", "--train.eval_every", "1", "--runs_dir", "/x"], None),
    ],
)
def test_the_first_difference_is_told_and_execution_is_none(args, difference):
    saved, wanted = (identity(config, config.gpt_config(1024)) for config in (RunConfig(), parse_args(args)))
    assert first_difference(saved, wanted) == difference


def test_a_later_key_that_is_gone_again_is_told_with_its_default():
    config = parse_args(["--data.packing", "true"])
    saved, wanted = (identity(config, config.gpt_config(1024)) for config in (config, RunConfig()))
    assert first_difference(saved, wanted) == "data.packing is False now and was True"


def test_dtype_is_execution():
    config = RunConfig()
    assert identity(config, config.gpt_config(9, "float32")) == identity(config, config.gpt_config(9, "bfloat16"))


def test_a_run_from_before_padding_was_known_goes_on():
    """Its identity, saved by then, has no such key."""
    config = parse_args(["--model.vocab_size", "128"])
    padded = config.gpt_config(100)
    now = identity(config, padded)
    assert now == identity(config, dataclasses.replace(padded, unpadded_vocab_size=None))
    assert "model.unpadded_vocab_size" not in now


def test_a_run_from_before_the_choice_of_gelu_goes_on():
    """It had GPT-2's, and its identity has no such key."""
    assert "model.exact_gelu" not in identity(RunConfig(), RunConfig().gpt_config(9))


def test_a_key_that_only_one_side_has_differs():
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == "b is 2 now and was None"
    assert first_difference({"a": 1, "b": 2}, {"a": 1}) == "b is None now and was 2"
    assert first_difference({"a": 1}, {"a": 1}) is None
