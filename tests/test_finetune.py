"""What must hold of fine-tuning as a person does it: what a run leaves, what it starts from, how it goes on."""

import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from slm_jax import cli
from slm_jax.commands import finetune
from slm_jax.config import FinetuneConfig, RunConfig, dump_config
from slm_jax.model import GPTModel
from slm_jax.param_file import read_tree
from slm_jax.run import load_run
from slm_jax.tokenizer import CharTokenizer
from slm_jax.trainable import from_leaf_table, merge_params
from slm_jax.training.checkpoint import load_params, read_metadata, saved_steps
from slm_jax.weights import load_gpt2
from slm_jax.weights.ours import read_checkpoint

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .:QA\n"
TEMPLATE = {"user_start": "Q: ", "assistant_start": "\nA: ", "assistant_end": "\n"}
TASKS, MODES = ("classification", "instruction"), ("all", "last_block", "lora")
# Checkpoints are read here as they lie on the disk, without saying onto which devices.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
STEPS, KILLED_AT = 24, 11
TIMES = ("seconds", "tokens_per_second", "mfu")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(n=60):
    """Letters or digits."""
    rng = np.random.default_rng(0)
    signs = ("abcdefghij", "0123456789")
    return [
        {"text": "".join(rng.choice(list(signs[i % 2]), 6 + i % 7)), "label": ("letters", "digits")[i % 2]}
        for i in range(n)
    ]


def instructions(n=20):
    return [{"instruction": f"double {i}", "output": f"{2 * i}."} for i in range(n)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data of both tasks, a template, and a model that was pretrained for two steps."""
    folder = tmp_path_factory.mktemp("finetune")
    jsonl(folder / "classification.jsonl", labelled())
    jsonl(folder / "instruction.jsonl", instructions())
    (folder / "template.json").write_text(json.dumps(TEMPLATE))
    (folder / "text.txt").write_text((ALPHABET + "\n") * 40)
    options = {
        "data.source": f"text:{folder / 'text.txt'}", "runs_dir": folder, "run": "base", "tokenizer.kind": "char",
        "model.n_layers": 2, "model.emb_dim": 16, "model.n_heads": 2, "model.context_length": 32, "train.steps": 2,
        "model.unroll": "false", "sample.every": 0, "optimizer.warmup_steps": 0,
    }  # fmt: skip
    assert cli.main(["train", *words(options)]) == 0
    return folder


def words(options):
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def options(place, task, runs, trainable="last_block", **more):
    """A run of seconds, with dropout, so that its keys matter."""
    values = {
        "task": task, "trainable": trainable, "base": place / "base", "runs_dir": runs, "run": "tuned",
        "data.source": f"jsonl:{place / task}.jsonl", "instruction.template": place / "template.json",
        "model.drop_rate": 0.1, "model.unroll": "false", "lora.rank": 2, "lora.drop_rate": 0.1,
        "classification.pad_to": "longest", "classification.pooling": "mean",
        "train.steps": STEPS, "train.batch_size": 4, "train.eval_every": 8,
        "train.eval_batch_size": 8, "train.log_every": 1, "checkpoint.every": 6, "sample.every": 8,
        "sample.max_new_tokens": 4, "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 1,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return words(values)


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):
    """Runs by task and by what is trained, each made once; what they started from is gone when they are done."""
    made = {}

    def make(task, trainable):
        if (task, trainable) not in made:
            runs = tmp_path_factory.mktemp(f"{task}-{trainable}")
            shutil.copytree(place / "base", runs / "base")
            arguments = options(place, task, runs, trainable, base=runs / "base")
            assert cli.main(["finetune", *arguments]) == 0
            shutil.rmtree(runs / "base")
            made[task, trainable] = (runs / "tuned", arguments)
        return made[task, trainable]

    return make


every = pytest.mark.parametrize(("task", "trainable"), [(task, mode) for task in TASKS for mode in MODES])


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def load(run, task):
    """The whole model of a run's last checkpoint."""
    step = saved_steps(run / "checkpoints")[-1]
    return read_checkpoint(run, step, "float32", classifier=task == "classification")[:2]


# What a run leaves


@every
def test_a_run_leaves_what_it_says(tuned, task, trainable):
    run, _ = tuned(task, trainable)
    expected = {"config.yaml", "metrics.jsonl", "loss.png", "summary.json", "before.json", "tokenizer", "checkpoints"}
    expected |= {"classification": {"confusion.png"}}.get(
        task, {"samples.md", "template.json", "responses.json", "responses-before.json"}
    )
    expected |= set() if trainable == "all" else {"frozen.safetensors"}
    assert {path.name for path in run.iterdir()} - {".lock"} == expected
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row["split"] == "val"] == [0, 8, 16, 24]
    assert ("accuracy" in rows[0]) == (task == "classification")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"] == json.loads((run / "before.json").read_text())
    assert summary["before"] != summary["after"]
    assert summary["before"].keys() == summary["after"].keys()
    assert summary["trained_parameters"] < summary["parameters"] or trainable == "all"


def test_the_figures_of_classification_are_of_all_splits(tuned):
    run, _ = tuned("classification", "all")
    after = json.loads((run / "summary.json").read_text())["after"]
    assert after.keys() == {"train", "validation", "test"}
    assert sum(np.array(split["confusion"]).sum() for split in after.values()) == 60
    for split in after.values():
        confusion = np.array(split["confusion"])
        assert split["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())
        assert split["loss"] > 0


def test_the_responses_are_those_to_the_test_instructions(tuned):
    run, _ = tuned("instruction", "all")
    entries = json.loads((run / "responses.json").read_text())
    assert len(entries) == json.loads((run / "summary.json").read_text())["after"]["test"]["responses"] == 4
    known = {row["instruction"]: row["output"] for row in instructions()}
    for entry in entries:
        assert known[entry["instruction"]] == entry["output"]
        assert isinstance(entry["model_response"], str)


# What is trained


@every
def test_what_is_frozen_stays_bitwise_and_what_is_trained_changes(place, tuned, task, trainable):
    run, _ = tuned(task, trainable)
    base = flat(load_gpt2(place / "base")[1])
    tuned_params = flat(load(run, task)[1])
    changed = {path for path in base if path in tuned_params and not np.array_equal(base[path], tuned_params[path])}
    if trainable == "all":
        assert changed == set(base)
        return
    if trainable == "last_block":
        blocks = {path for path in base if path.startswith("blocks/")}
        assert changed == blocks | {"final_norm/scale", "final_norm/bias"}
        for path in blocks:
            assert tuned_params[path][:1].tobytes() == base[path][:1].tobytes()
            assert (tuned_params[path][1:] != base[path][1:]).any()
        return
    kernels = {f"blocks/{name}/kernel" for name in ("attn/qkv", "attn/out_proj", "ff/fc", "ff/proj")}
    assert changed == kernels  # by the merged adapters
    frozen = flat(read_tree(run / "frozen.safetensors"))
    for path, leaf in base.items():
        assert frozen[path].tobytes() == leaf.tobytes()


@every
def test_checkpoints_hold_what_is_trained_only(tuned, task, trainable):
    run, _ = tuned(task, trainable)
    saved = ocp.load_checkpointables(run / "checkpoints" / str(STEPS), {"params": None, "state": None})
    names = {path.rpartition("/")[2] if "adapter" in path else path.split("/")[0] for path in flat(saved["params"])}
    head = {"class_head"} if task == "classification" else set()
    everything = {"tok_emb", "pos_emb", "blocks", "final_norm"} | head
    expected = {"all": everything, "last_block": {"blocks_1", "final_norm"} | head, "lora": {"lora_a", "lora_b"} | head}
    assert names == expected[trainable]
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in saved.items()}
    trained = json.loads((run / "summary.json").read_text())["trained_parameters"]
    assert sizes["params"] == trained
    assert 2 * trained <= sizes["state"] <= 2 * trained + 8  # two moments, steps, a key


# What can be done with it, its base being gone


@every
def test_a_finished_run_started_again_is_left_as_it_is(tuned, task, trainable, capsys):
    run, arguments = tuned(task, trainable)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["finetune", *arguments]) == 0
    assert "has done its 24 steps" in " ".join(capsys.readouterr().out.split())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("trainable", MODES)
def test_an_instruction_run_writes_text(tuned, trainable, capsys):
    run, _ = tuned("instruction", trainable)
    loaded = load_run(run)
    assert loaded.template is not None
    assert loaded.template.to_dict().items() >= TEMPLATE.items()
    assert cli.main(["generate", "--run", str(run), "--prompt", "Q: a", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Q: a")


@pytest.mark.parametrize("trainable", MODES)
def test_a_classifier_writes_no_text(tuned, trainable, capsys):
    run, _ = tuned("classification", trainable)
    fails(["generate", "--run", str(run)], capsys, "is a classifier", "slm-jax classify")


@pytest.mark.parametrize("trainable", ["last_block", "lora"])
def test_what_is_exported_is_the_whole_model_merged(tuned, trainable, tmp_path):
    run, _ = tuned("instruction", trainable)
    step = saved_steps(run / "checkpoints")[-1]
    assert cli.main(["export", "--run", f"{run}@{step}", "--out", str(tmp_path / "hf")]) == 0
    cfg, exported = load_gpt2(tmp_path / "hf")
    table = from_leaf_table(read_metadata(run / "checkpoints", step)["leaves"])
    trained = load_params(run / "checkpoints", step, table)
    parts = merge_params(read_tree(run / "frozen.safetensors"), trained)  # adapters beside their matrices
    apply = jax.jit(lambda params: GPTModel(cfg).apply({"params": params}, jnp.arange(24).reshape(2, 12)))
    beside = apply(jax.tree.map(jnp.asarray, parts))
    assert np.abs(apply(exported) - beside).max() <= 1e-5 * np.abs(beside).max()
    assert flat(exported).keys() == flat(load(run, "instruction")[1]).keys()


# Killed and resumed

KILL = """
import os, signal, sys
from slm_jax import cli
from slm_jax.training.loop import Trainer

log = Trainer._log

def log_and_die(self, step, metrics):
    log(self, step, metrics)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

Trainer._log = log_and_die
cli.main(sys.argv[1:])
"""


def outcome(run):
    """All that must be equal of two runs."""
    step = saved_steps(run / "checkpoints")[-1]
    arrays = ocp.load_checkpointables(run / "checkpoints" / str(step), {"params": None, "state": None})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    texts = ("samples.md", "responses.json", "responses-before.json", "before.json")
    return {
        "arrays": [(str(path), leaf.tobytes()) for path, leaf in sorted_leaves(arrays)],
        "data": read_metadata(run / "checkpoints", step)["data"],
        "metrics": [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
        "texts": [(run / name).read_text() for name in texts if (run / name).exists()],
        "after": json.loads((run / "summary.json").read_text())["after"],
    }


def sorted_leaves(tree):
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "trainable"), [(task, mode) for task in TASKS for mode in ("last_block", "lora")])
def test_killed_equals_unbroken_bitwise(place, tuned, tmp_path, task, trainable):
    """SIGKILL after step 11; from what was saved by then it goes on, without its base."""
    unbroken, _ = tuned(task, trainable)
    shutil.copytree(place / "base", tmp_path / "base")
    arguments = options(place, task, tmp_path, trainable, base=tmp_path / "base")
    script = KILL.format(step=KILLED_AT)
    process = subprocess.run([sys.executable, "-c", script, "finetune", *arguments], capture_output=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert saved_steps(tmp_path / "tuned" / "checkpoints")[-1] in (6, 8)
    assert not (tmp_path / "tuned" / "summary.json").exists()
    shutil.rmtree(tmp_path / "base")
    assert cli.main(["finetune", *arguments]) == 0
    found, expected = outcome(tmp_path / "tuned"), outcome(unbroken)
    for name in expected:
        assert found[name] == expected[name], name


# What a run does not go on from


@pytest.fixture
def stopped(tuned, tmp_path):
    """A copy of a finished run that is asked for more steps."""
    run, arguments = tuned("classification", "last_block")
    shutil.copytree(run, tmp_path / "tuned")
    at = arguments.index("--runs_dir") + 1
    return tmp_path / "tuned", [*arguments[:at], str(tmp_path), *arguments[at + 1 :], "--train.steps", str(STEPS + 1)]


def test_a_damaged_file_of_frozen_parameters_is_refused(stopped, capsys):
    run, arguments = stopped
    whole = (run / "frozen.safetensors").read_bytes()
    for content in (whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], whole[:-1], b""):
        (run / "frozen.safetensors").write_bytes(content)
        before = (run / "metrics.jsonl").read_bytes()
        fails(["finetune", *arguments], capsys, "frozen.safetensors", "restore")
        assert (run / "metrics.jsonl").read_bytes() == before
    (run / "frozen.safetensors").unlink()
    fails(["finetune", *arguments], capsys, "frozen.safetensors: no such file")
    (run / "frozen.safetensors").write_bytes(whole)
    assert cli.main(["finetune", *arguments]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--base", "other"], "base is 'other' now and was"),
        (["--trainable", "lora"], "trainable is 'lora' now and was 'last_block'"),
        (["--classification.pooling", "last"], "classification.pooling is 'last' now and was 'mean'"),
        (["--data.test_fraction", "0.3"], "data.test_fraction is 0.3 now and was 0.2"),
        (["--task", "instruction"], "task is 'instruction' now and was 'classification'"),
    ],
    ids=str,
)
def test_another_run_is_not_gone_on_with(place, stopped, capsys, more, said):
    run, arguments = stopped
    if "instruction" in more:
        more = [*more, "--data.source", f"jsonl:{place}/instruction.jsonl"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fails(["finetune", *arguments, *more], capsys, said, "--run NAME")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# Bad input


def fails(arguments, capsys, *said):
    """The command ends with 2 and one line on stderr that says all of ``said``."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    for text in said:
        assert text in lines[0]
    assert "Traceback" not in lines[0]


def label(i, **fields):
    """The rows of classification, one of them changed."""
    rows = labelled()
    rows[i] = {**rows[i], **fields}
    return rows


BAD_TEXTS = {
    "missing column": ([{"message": "a", "label": "x"}], {}, ["line 1", "no column 'text'", "message, label"]),
    "empty text": (label(3, text=" "), {}, ["line 4", "text is empty"]),
    "unlabelled row": (label(2, label=None), {}, ["line 3", "label is None", "no label"]),
    "one class": ([{**row, "label": "one"} for row in labelled()], {}, ["one class only", "'one'"]),
    "no such LoRA target": (labelled(), {"trainable": "lora", "lora.targets": "mlp/*"}, ["'mlp/*'", "attn/q"]),
    "too many blocks": (labelled(), {"trainable": "last_n_blocks", "trainable_blocks": 3}, ["3", "has 2 blocks"]),
    "a longer text than the context": (labelled(), {"classification.max_length": 33}, ["is 33", "context of 32"]),
    "a letter that the base lacks": (label(1, text="\u03a9mega"), {}, ["\u03a9"]),
    "too few texts": (labelled(3), {}, ["split has no text"]),
    "another tokenizer": (labelled(), {"tokenizer.path": "OTHER"}, ["base", "another tokenizer"]),
    "another shape": (labelled(), {"model.emb_dim": 32}, ["model.emb_dim is 32, and the base's is 16", "leave it out"]),
    "no base": (labelled(), {"base": "nowhere/at-all"}, ["nowhere/at-all"]),
    "no model": (labelled(), {"trainable": "all", "base": "DATA"}, ["data"]),
}


@pytest.mark.parametrize("bad", BAD_TEXTS)
def test_bad_labelled_texts_and_bases_are_one_line(place, tmp_path, capsys, bad):
    rows, more, said = BAD_TEXTS[bad]
    data = jsonl(tmp_path / "data.jsonl", rows)
    CharTokenizer(ALPHABET[:-1]).save(tmp_path / "other")
    more = {key: {"OTHER": tmp_path / "other", "DATA": data}.get(value, value) for key, value in more.items()}
    arguments = [*options(place, "classification", tmp_path / "runs", data__source=f"jsonl:{data}"), *words(more)]
    fails(["finetune", *arguments], capsys, *said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("split", "row", "said"),
    [
        ("test", {"text": "new 1", "label": "signs"}, ["test.jsonl line 1", "'signs'", "never occurs in training"]),
        ("validation", labelled()[4], ["(validation) and", "(train) are equal", "group_duplicates=false"]),
        ("test", {"text": "new 2"}, ["test.jsonl line 1", "no column 'label' but text"]),
    ],
    ids=["unseen label", "duplicate", "no labels"],
)
def test_bad_texts_of_given_splits_are_one_line(place, tmp_path, capsys, split, row, said):
    more = {f"data__{split}_source": f"jsonl:{jsonl(tmp_path / f'{split}.jsonl', [row])}"}
    fails(["finetune", *options(place, "classification", tmp_path / "runs", **more)], capsys, *said)
    assert not (tmp_path / "runs").exists()


BAD_INSTRUCTIONS = {
    "no list": ({"instruction": "a", "output": "b"}, {}, ["one object with instruction, output", "no list"]),
    "no object": ([{"instruction": "a", "output": "b"}, 3], {}, ["entry 2", "a number", "no JSON object"]),
    "no output": ([{"instruction": "a"}], {}, ["entry 1", "no field 'output' but instruction"]),
    "empty output": ([{"instruction": "a", "output": " "}], {}, ["entry 1", "output is empty"]),
    "all too long": (
        [{"instruction": "a" * (40 + i), "output": "b"} for i in range(20)],
        {},
        ["longer than 32 tokens"],
    ),
    "responses alone too long": (
        [{"instruction": f"{i}", "output": "b" * 50} for i in range(20)],
        {"instruction.too_long": "truncate"},
        ["nothing to learn from", "the response alone is longer than 32 tokens"],
    ),
    "too few": (instructions(3), {}, ["split gets none of the 3 examples"]),
    "no such template": (instructions(), {"instruction.template": "alpaka"}, ["'alpaka'", "alpaca"]),
    "no base": (instructions(), {"base": "nowhere/at-all"}, ["nowhere/at-all"]),
    "no such LoRA target": (instructions(), {"trainable": "lora", "lora.targets": "class_head"}, ["'class_head'"]),
    "a tied head alone": (instructions(), {"trainable": "head"}, ["trainable is head", "tie_weights"]),
}


@pytest.mark.parametrize("bad", BAD_INSTRUCTIONS)
def test_bad_instructions_are_one_line(place, tmp_path, capsys, bad):
    content, more, said = BAD_INSTRUCTIONS[bad]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(content))
    arguments = [*options(place, "instruction", tmp_path / "runs", data__source=f"json:{data}"), *words(more)]
    fails(["finetune", *arguments], capsys, *said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", TASKS)
def test_a_classifier_is_no_base(place, tuned, tmp_path, capsys, task):
    run, _ = tuned("classification", "all")
    fails(["finetune", *options(place, task, tmp_path / "runs", base=run)], capsys, "is a classifier")
    assert not (tmp_path / "runs").exists()


def test_commands_send_each_other_their_tasks(place, tmp_path, capsys):
    arguments = options(place, "classification", tmp_path / "runs")
    fails(["train", *arguments], capsys, "task is classification", "slm-jax finetune")
    fails(["finetune", *arguments, "--task", "pretraining"], capsys, "task is pretraining", "slm-jax train")


# The tiny model that is not there yet


def test_the_tiny_model_is_pretrained_first_if_it_is_missing(tmp_path, monkeypatch, capsys):
    """Both runs are only written down here: together they take minutes."""
    begun = []
    monkeypatch.setattr(finetune.train, "run", lambda options: begun.append(options) or 0)
    config = FinetuneConfig(base=str(tmp_path / "tiny"), runs_dir=str(tmp_path))
    assert finetune.run(config) == 0
    assert begun == [RunConfig(run="tiny", runs_dir=str(tmp_path)), config]
    assert "pretraining the tiny model first" in capsys.readouterr().err


def test_it_goes_no_further_if_that_is_stopped(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(finetune.train, "run", lambda options: begun.append(options) or 130)
    assert finetune.run(FinetuneConfig(base=str(tmp_path / "tiny"))) == 130
    assert len(begun) == 1


def first(config):
    return finetune._missing_base(config)


def test_no_other_base_is_made(tmp_path):
    assert first(FinetuneConfig(base=str(tmp_path / "mine"))) is None
    assert first(FinetuneConfig(base=None, trainable="all")) is None
    assert first(FinetuneConfig(base="gpt2")) is None


def test_a_tiny_model_that_is_there_is_taken_and_one_half_done_is_finished(tmp_path):
    config = FinetuneConfig(base=str(tmp_path / "tiny"), runs_dir=str(tmp_path))
    tiny = RunConfig(run="tiny", runs_dir=str(tmp_path))
    (tmp_path / "tiny").mkdir()
    assert first(config) is None  # not ours to fill
    (tmp_path / "tiny" / "config.yaml").write_text(dump_config(tiny))
    assert first(config) == tiny
    (tmp_path / "tiny" / "summary.json").write_text("{}")
    assert first(config) is None


def test_a_run_that_goes_on_needs_no_base(tmp_path):
    config = FinetuneConfig(base=str(tmp_path / "tiny"), runs_dir=str(tmp_path))
    (config.folder / "checkpoints").mkdir(parents=True)
    assert first(config) is None
