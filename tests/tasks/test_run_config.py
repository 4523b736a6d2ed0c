"""What must hold of a run's configuration: its ranges, its names, what goes together, the model that it describes."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from slm_jax.config import dump_config, execution_keys, flatten, keys, to_dict
from slm_jax.errors import InputError
from slm_jax.model import PRESETS, GPTConfig
from slm_jax.tasks.config import TASKS, FinetuneConfig, RunConfig, parse_args
from slm_jax.training.config import ModelConfig, TrainConfig


def refused(*args: str) -> str:
    """The one line that these arguments are refused with."""
    with pytest.raises(InputError) as error:
        parse_args(args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_run_is_named_after_the_last_recipe_or_by_run(tmp_path):
    for name, content in (("one.yaml", "seed: 1"), ("two.yml", "seed: 2"), ("named.yaml", "run: mine")):
        (tmp_path / name).write_text(content)
    one, two, named = (f"--config={tmp_path}/{name}" for name in ("one.yaml", "two.yml", "named.yaml"))
    for words, run in (([one], "one"), ([one, two], "two"), ([one, "--run", "other"], "other"), ([named, one], "mine")):
        assert parse_args(words).run == run
    assert parse_args(["--config", "shakespeare_char"]).name == "shakespeare_char"
    assert parse_args(["--runs_dir", "/data"]).folder == Path("/data/tiny")
    assert parse_args([]).mirror_folder is None
    assert parse_args(["--checkpoint.mirror", str(tmp_path), "--run", "a/b"]).mirror_folder == tmp_path / "a" / "b"


@pytest.mark.parametrize("cls", [RunConfig, FinetuneConfig])
def test_a_dumped_configuration_names_every_key_and_reads_back(tmp_path, cls):
    config = dataclasses.replace(cls(), run="x", train=TrainConfig(epochs=1.5, steps=None))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert flatten(yaml.safe_load(dump_config(config))).keys() == keys(cls).keys()
    assert parse_args(["--config", str(tmp_path / "config.yaml")], cls) == config


def test_every_task_has_a_section_and_defaults():
    for task, defaults in TASKS.items():
        config = parse_args(["--task", task], RunConfig if task == "pretraining" else FinetuneConfig)
        assert (config.name, config.data.source) == (defaults.recipe, defaults.source)
    assert TASKS["instruction"].source == "builtin:docstrings"
    assert TASKS["classification"].source == "builtin:prose-or-code"
    assert tuple(TASKS) == keys(RunConfig)["task"].choices
    assert execution_keys(FinetuneConfig()) == execution_keys(RunConfig())


OUT_OF_RANGE = {
    "0": [
        "train.steps",
        "train.epochs",
        "mesh.data",
        "optimizer.learning_rate",
        "model.n_layers",
        "data.test_fraction",
    ],
    "-1": ["optimizer.weight_decay", "sample.temperature", "seed", "instruction.responses", "model.drop_rate"],
    "1": ["optimizer.beta1", "data.validation_fraction", "instruction.max_length"],
    "-2": ["mesh.data"],
    "130": ["model.emb_dim"],  # four heads
    ".inf": ["train.epochs"],
    "../x": ["run"],
    "/x": ["run"],
    " ": ["run", "runs_dir", "checkpoint.mirror"],
    "5": ["train.profile"],
}


@pytest.mark.parametrize("value", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(value):
    for key in OUT_OF_RANGE[value]:
        line = refused(f"--{key}={value}")
        assert line.startswith(f"{key} is ")
        assert "; expected " in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--train.steps", "null"], ["train.steps", "train.epochs"]),
        (["--train.batch_size", "6", "--train.accumulate", "4"], ["train.accumulate is 4", "train.batch_size 6"]),
        (["--model.emb_dim", "100", "--model.n_heads", "3"], ["model.emb_dim is 100", "model.n_heads 3"]),
        (["--trainable", "head"], ["trainable is head", "base"]),
        (["--trainable", "lora", "--base", "x", "--config", "no_targets.yaml"], ["lora.targets is empty"]),
    ],
)
def test_values_that_do_not_go_together_are_refused(words, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("no_targets.yaml").write_text("lora: {targets: []}")
    line = refused(*words)
    for part in parts:
        assert part in line


def test_the_model_section_has_the_fields_of_a_model():
    fields = {field.name: field.type for field in dataclasses.fields(GPTConfig) if field.name != "unpadded_vocab_size"}
    section = keys(ModelConfig)
    assert section.keys() == fields.keys() | {"preset"}
    assert section["preset"].choices == tuple(PRESETS)
    for name in ("param_dtype", "remat", "attention"):
        assert section[name].choices == get_args(get_type_hints(GPTConfig)[name])
    config = parse_args(["--model.n_layers", "2", "--model.drop_rate", "0.5", "--model.bias", "false"])
    cfg = config.gpt_config(50, "bfloat16")
    assert (cfg.n_layers, cfg.drop_rate, cfg.bias, cfg.dtype, cfg.emb_dim) == (2, 0.5, False, "bfloat16", 128)


def test_ids_beyond_the_tokenizer_are_only_padding():
    config = parse_args(["--model.vocab_size", "128"])
    assert (config.gpt_config(100).vocab_size, config.gpt_config(100).unpadded_vocab_size) == (128, 100)
    assert config.gpt_config(128).unpadded_vocab_size is None
    assert RunConfig().gpt_config(100).unpadded_vocab_size is None
    assert flatten(to_dict(RunConfig())).keys() == keys(RunConfig).keys()
    with pytest.raises(InputError, match=r"model\.vocab_size is 128; expected at least the tokenizer's 129"):
        config.gpt_config(129)
