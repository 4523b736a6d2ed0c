"""What must hold of a run's configuration: what is read, and what is refused and how."""

import dataclasses
import json
from pathlib import Path

import pytest

from slm_jax.config import dump_config, flatten, to_dict
from slm_jax.errors import InputError, MissingInputError
from slm_jax.model import GPTConfig
from slm_jax.tasks.config import RunConfig, parse_args

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe file; return its path."""

    def write(content: str | bytes, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refused(*args: str) -> str:
    """The one line that these arguments are refused with."""
    with pytest.raises(InputError) as error:
        parse_args([str(arg) for arg in args])
    assert "\n" not in str(error.value)
    return str(error.value)


# What is read


def test_no_arguments_are_the_tiny_recipe():
    tiny = parse_args(["--config", str(CONFIGS / "tiny.yaml")])
    assert dataclasses.replace(tiny, run=None) == parse_args([]) == RunConfig()
    assert tiny.name == RunConfig().name == "tiny"
    assert RunConfig().folder == Path("runs/tiny")


def test_what_comes_later_wins(recipe):
    first = recipe("train: {steps: 5, batch_size: 3}\nseed: 1\n", "first.yaml")
    second = recipe("train: {steps: 6}\n", "second.yaml")
    config = parse_args(["--config", str(first), "--config", str(second), "--seed", "2"])
    assert (config.train.steps, config.train.batch_size, config.seed) == (6, 3, 2)
    assert parse_args(["--seed", "2", f"--config={first}"]).seed == 1
    assert parse_args([f"--config={first}", "--train.steps=7"]).train == dataclasses.replace(
        RunConfig().train, steps=7, batch_size=3
    )


def test_what_a_recipe_does_not_say_keeps_its_default(recipe):
    config = parse_args(["--config", str(recipe("optimizer: {schedule: wsd}"))])
    assert config.optimizer == dataclasses.replace(RunConfig().optimizer, schedule="wsd")
    assert dataclasses.replace(config, optimizer=RunConfig().optimizer, run=None) == RunConfig()


def test_the_run_is_named_after_the_last_recipe_unless_it_is_said(recipe):
    one, two = recipe("seed: 1", "one.yaml"), recipe("seed: 1", "two.yml")
    named = recipe("run: mine", "named.yaml")
    assert parse_args(["--config", str(one)]).run == "one"
    assert parse_args(["--config", str(one), "--config", str(two)]).run == "two"
    assert parse_args(["--config", str(one), "--run", "other"]).run == "other"
    assert parse_args(["--config", str(named)]).run == "mine"
    assert parse_args(["--runs_dir", "/data"]).folder == Path("/data/tiny")


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001", "1E-3", "1.e-3"])
def test_floats_may_be_written_in_any_way(recipe, text):
    """YAML 1.1 itself would read 1e-3 as text."""
    path = recipe(f"optimizer:\n  learning_rate: {text}\n  weight_decay: 1\n")
    for config in (
        parse_args(["--config", str(path)]),
        parse_args(["--optimizer.learning_rate", text, "--optimizer.weight_decay", "1"]),
    ):
        assert config.optimizer.learning_rate == 0.001
        assert type(config.optimizer.learning_rate) is float
        assert config.optimizer.weight_decay == 1


def test_text_stays_text(recipe):
    for prompt in ("5", "true", "{a: b}", "1: 2", "", "\n", "  ", "été", "# Title", "-x"):
        assert parse_args(["--sample.prompt", prompt]).sample.prompt == prompt
        path = recipe(f"sample: {json.dumps({'prompt': prompt})}")
        assert parse_args(["--config", str(path)]).sample.prompt == prompt


def test_null_is_for_what_may_be_left_open(recipe):
    path = recipe("optimizer: {clip_norm: null}\ntrain: {steps: null, epochs: 2}\nsample: {top_k: null}")
    config = parse_args(["--config", str(path)])
    assert (config.optimizer.clip_norm, config.train.steps, config.sample.top_k) == (None, None, None)
    assert parse_args(["--optimizer.clip_norm", "null"]).optimizer.clip_norm is None


# There and back


CHANGED = ["--seed", "3", "--run", "x", "--optimizer.learning_rate", "3e-4", "--optimizer.eps", "1e-12"]
CHANGED += ["--optimizer.clip_norm", "null", "--train.epochs", "1.5", "--model.emb_dim", "64", "--model.tie_weights"]
CHANGED += ["false", "--data.validation_source", "text:ü.txt", "--sample.prompt", "a: 'b'\n#c"]


@pytest.mark.parametrize("args", [[], CHANGED], ids=["defaults", "changed"])
def test_a_configuration_survives_plain_data_and_yaml(tmp_path, args):
    config = parse_args(args)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert dataclasses.replace(parse_args(["--config", str(path)]), run=config.run) == config


def test_a_dumped_configuration_names_every_key():
    import yaml

    assert flatten(yaml.safe_load(dump_config(RunConfig()))).keys() == flatten(to_dict(RunConfig())).keys()


# What is refused: keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.step", "train.steps"),
        ("trian.steps", "train.steps"),
        ("steps", "train.steps"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("optimizer.lerning_rate", "optimizer.learning_rate"),
        ("model.n_head", "model.n_heads"),
        ("batchsize", "train.batch_size"),
        ("trian.batch_size", "train.batch_size"),
        ("sede", "seed"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(recipe, key, nearest):
    said = f"unknown key {key}; did you mean {nearest}?"
    assert refused(f"--{key}", "5") == said
    assert refused(f"--{key}=5") == said
    section, _, leaf = key.rpartition(".")
    path = recipe(f"{section}:\n  {leaf}: 5\n" if section else f"{leaf}: 5\n")
    assert refused("--config", path) == f"{path}: {said}"


@pytest.mark.parametrize(
    "content", ["xyzzy: 1", "xyzzy: {}", "train: {xyzzy: 1}", "1: 2", "true: 1", "null: 1", "1.5: {2: 1}"]
)
def test_a_key_like_no_other_is_refused_too(recipe, content):
    path = recipe(content)
    said = refused("--config", path)
    assert said.startswith(f"{path}: unknown key ")
    assert "--help" in said


def test_the_wrong_one_of_two_recipes_is_named(recipe):
    good, bad = recipe("seed: 1", "good.yaml"), recipe("train: {steps: x}", "bad.yaml")
    for order in ((good, bad), (bad, good)):
        assert refused("--config", order[0], "--config", order[1]).startswith(f"{bad}: train.steps is 'x'")
    assert refused("--config", good, "--train.steps", "x").startswith("train.steps is 'x'")  # no file's mistake


def test_words_that_are_no_options_are_refused():
    assert "'extra'" in refused("extra")
    assert "--train.steps" in refused("--train.steps")
    assert "train is '5'; expected one of its keys" in refused("--train", "5")


# What is refused: values


WRONG_TYPES = [
    ("train.steps", "five", "a whole number"),
    ("train.steps", "1.5", "a whole number"),
    ("train.steps", "true", "a whole number"),
    ("train.batch_size", "[1, 2]", "a whole number"),
    ("optimizer.learning_rate", "fast", "a number"),
    ("optimizer.learning_rate", "true", "a number"),
    ("model.drop_rate", "none", "a number"),
    ("model.tie_weights", "maybe", "true or false"),
    ("data.shuffle", "2", "true or false"),
    ("task", "poetry", "pretraining"),
    ("resume", "maybe", "auto, never, must"),
    ("model.preset", "big", "tiny, mini, gpt2-small"),
    ("model.dtype", "int8", "auto, float32, bfloat16, float16"),
    ("tokenizer.kind", "words", "bpe, char, simple, gpt2"),
    ("optimizer.schedule", "linear", "cosine, constant, wsd"),
    ("data.sampling", "sliding", "random, stride"),
]

OUT_OF_RANGE = [
    ("seed", "-1", "at least 0"),
    ("seed", "4294967296", "below 2**32"),
    ("train.steps", "0", "at least 1"),
    ("train.batch_size", "0", "at least 1"),
    ("train.accumulate", "0", "at least 1"),
    ("train.epochs", "0", "above 0"),
    ("train.epochs", ".inf", "above 0"),
    ("train.eval_every", "0", "at least 1"),
    ("train.log_every", "0", "at least 1"),
    ("checkpoint.every", "0", "at least 1"),
    ("checkpoint.keep", "0", "at least 1"),
    ("optimizer.learning_rate", "0", "above 0"),
    ("optimizer.learning_rate", "-1", "above 0"),
    ("optimizer.learning_rate", ".nan", "above 0"),
    ("optimizer.learning_rate", ".inf", "above 0"),
    ("optimizer.weight_decay", "-0.1", "at least 0"),
    ("optimizer.weight_decay", ".inf", "finite"),
    ("optimizer.weight_decay", ".nan", "at least 0"),
    ("optimizer.warmup_steps", "-1", "at least 0"),
    ("optimizer.beta1", "1", "at least 0 and below 1"),
    ("optimizer.beta2", "-0.5", "at least 0 and below 1"),
    ("optimizer.clip_norm", "0", "above 0"),
    ("data.validation_fraction", "0", "between 0 and 1"),
    ("data.validation_fraction", "1.5", "between 0 and 1"),
    ("data.stride", "0", "at least 1"),
    ("mesh.data", "0", "-1 (all devices) or at least 1"),
    ("mesh.fsdp", "0", "at least 1"),
    ("mesh.tensor", "2", "expected 1"),
    ("sample.temperature", "-1", "at least 0"),
    ("sample.temperature", ".inf", "finite"),
    ("sample.top_k", "0", "at least 1"),
    ("model.n_layers", "0", "at least 1"),
    ("model.context_length", "-5", "at least 1"),
    ("model.drop_rate", "1.0", "below 1"),
    ("model.emb_dim", "130", "such as 132"),  # four heads
    ("run", "../x", "a folder name inside runs_dir"),
    ("run", "/x", "a folder name inside runs_dir"),
    ("run", "' '", "a folder name inside runs_dir"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG_TYPES + OUT_OF_RANGE)
def test_a_wrong_value_is_named_with_what_was_expected_and_the_file(recipe, key, value, expected):
    said = refused(f"--{key}={value.strip(chr(39))}")
    section, _, leaf = key.rpartition(".")
    path = recipe(f"{section}:\n  {leaf}: {value}\n" if section else f"{leaf}: {value}\n")
    in_file = refused("--config", path)
    assert in_file.startswith(f"{path}: {key} is ")
    for text in (said, in_file.removeprefix(f"{path}: ")):
        assert text.startswith(f"{key} is ")
        shown = text.partition("; expected ")[0].lower()
        assert any(form in shown for form in (value.lower().strip("'"), value.removeprefix("."), str(float_of(value))))
        assert expected in text.partition(f"{key} is ")[2]


def float_of(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize(
    "key",
    ["seed", "task", "runs_dir", "data.source", "data.shuffle", "train.batch_size", "model.preset"],
)
def test_null_is_refused_where_there_must_be_a_value(recipe, key):
    section, _, leaf = key.rpartition(".")
    path = recipe(f"{section}:\n  {leaf}: null\n" if section else f"{leaf}: null\n")
    assert refused("--config", path).startswith(f"{path}: {key} is null; expected ")


def test_values_that_do_not_go_together_are_refused():
    assert refused("--train.steps", "null") == (
        "train.steps and train.epochs are both null; expected at least one of them"
    )
    said = refused("--train.batch_size", "6", "--train.accumulate", "4")
    assert "train.accumulate is 4" in said
    assert "train.batch_size 6" in said
    said = refused("--model.emb_dim", "100", "--model.n_heads", "3")
    assert "model.emb_dim is 100" in said
    assert "model.n_heads 3" in said


def test_a_model_with_too_few_ids_for_the_tokenizer_is_refused():
    config = parse_args(["--model.vocab_size", "100"])
    assert config.gpt_config(90).vocab_size == 100
    with pytest.raises(InputError, match=r"model\.vocab_size is 100, but the tokenizer has 101") as error:
        config.gpt_config(101)
    assert "\n" not in str(error.value)
    assert RunConfig().gpt_config(777).vocab_size == 777


# What is refused: files


def test_a_recipe_that_is_not_there(tmp_path):
    path = tmp_path / "nope.yaml"
    with pytest.raises(MissingInputError) as error:
        parse_args(["--config", str(path)])
    assert str(error.value).startswith(f"{path}: No such file")
    assert "expected a recipe" in str(error.value)
    assert refused("--config", tmp_path).startswith(f"{tmp_path}: ")
    assert "--config" in refused("--config")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- a\n- b\n", "expected keys and values"),
        ("hello", "expected keys and values"),
        ("", "expected keys and values"),
        ("# nothing but a comment\n", "expected keys and values"),
        ("train: 5", "train is 5; expected keys such as steps below it"),
        ("train:\n  - steps: 5", "expected keys such as steps below it"),
        ("model:", "model is None; expected keys such as preset below it"),
        ("seed: {a: 1}", "unknown key seed.a"),
        ("a: [1", "not valid YAML: "),
        ("train:\n  steps: 5\n batch_size: 3", "line 3"),
        ("\tseed: 1", "not valid YAML: "),
        ("!!python/object:os.system {}", "not valid YAML: "),
        (b"seed: 1\nrun: caf\xe9\n", "not UTF-8 at byte 16"),
        (b"\x00\x01\x02", "not valid YAML: "),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line_that_names_it(recipe, content, expected):
    path = recipe(content)
    said = refused("--config", path)
    assert said.startswith(f"{path}: ")
    assert expected in said


def test_ids_beyond_the_tokenizer_are_only_padding():
    config = parse_args(["--model.vocab_size", "128"])
    assert config.gpt_config(100).unpadded_vocab_size == 100
    assert config.gpt_config(128).unpadded_vocab_size is None
    assert RunConfig().gpt_config(100).unpadded_vocab_size is None
    assert refused("--model.unpadded_vocab_size", "100").startswith("unknown key model.unpadded_vocab_size")


def test_every_model_field_can_be_set():
    model_keys = {key.removeprefix("model.") for key in flatten(to_dict(RunConfig())) if key.startswith("model.")}
    fields = {field.name for field in dataclasses.fields(GPTConfig)} - {"unpadded_vocab_size"}
    assert model_keys == fields | {"preset"}
    config = parse_args(["--model.n_layers", "2", "--model.drop_rate", "0.5", "--model.bias", "false"])
    cfg = config.gpt_config(50, "bfloat16")
    assert (cfg.n_layers, cfg.drop_rate, cfg.bias, cfg.dtype, cfg.emb_dim) == (2, 0.5, False, "bfloat16", 128)


@pytest.mark.parametrize("key", ["runs_dir", "checkpoint.mirror"])
@pytest.mark.parametrize("value", ["", " "])
def test_a_folder_without_a_name_is_refused(key, value):
    assert refused(f"--{key}={value}") == f"{key} is {value!r}; expected a folder, or leave it out"


def test_the_mirror_has_the_run_under_its_name(tmp_path):
    assert parse_args([]).mirror_folder is None
    assert parse_args(["--checkpoint.mirror", str(tmp_path), "--run", "a/b"]).mirror_folder == tmp_path / "a" / "b"
