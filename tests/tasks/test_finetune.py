"""What must hold of fine-tuning as a person does it: what a run writes, what it starts from, how it resumes."""

import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetuning import STEPS, TASKS, TEMPLATE, instructions, options, save_new
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp
from pretraining import metrics
from refusals import contents, fails

from slm_jax import cli, load_classifier
from slm_jax.commands import finetune
from slm_jax.config import dump_config
from slm_jax.data.config import DataConfig, InstructionConfig
from slm_jax.errors import InputError
from slm_jax.model import GPTModel
from slm_jax.nn.blocks import merge_params
from slm_jax.runs import load_gpt2, load_model, load_run, read_checkpoint
from slm_jax.tasks.config import FinetuneConfig, RunConfig, get_task
from slm_jax.training.checkpoint import load_params, read_metadata
from slm_jax.training.config import CheckpointConfig
from slm_jax.training.manifest import saved_steps
from slm_jax.training.trainable import from_leaf_table
from slm_jax.weights.adapters import add_adapters, load_adapters, merge_adapters, split_adapters
from slm_jax.weights.trees import read_tree, write_tree

# Checkpoints are read here as they lie on the disk, without saying onto which devices.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
KILLED_AT = 5

QUICK = [("classification", "last_block"), ("instruction", "lora")]
SLOW = [pytest.param(*run, marks=pytest.mark.slow) for run in (("classification", "lora"), ("instruction", "all"))]
every = pytest.mark.parametrize(("task", "trainable"), [*QUICK, *SLOW])


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def load(run, task):
    """The whole model of a run's last checkpoint."""
    step = saved_steps(run / "checkpoints")[-1]
    return read_checkpoint(run, step, "float32", classifier=task == "classification")[:2]


@every
def test_a_run_leaves_what_it_says(tuned, task, trainable):
    run, _ = tuned(task, trainable)
    expected = {"config.yaml", "metrics.jsonl", "loss.png", "summary.json", "before.json", "tokenizer", "checkpoints"}
    answers = {"samples.md", "template.json", "responses.json", "responses-before.json"}
    expected |= {"confusion.png"} if task == "classification" else answers
    expected |= set() if trainable == "all" else {"frozen.safetensors"}
    assert {path.name for path in run.iterdir()} - {".lock"} == expected
    rows = metrics(run)
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row["split"] == "val"] == [0, 4, 8, 12]
    assert ("accuracy" in rows[0]) == (get_task(task).score in rows[0]) == (task == "classification")
    assert set(get_task(task).written) == ({"confusion.png"} if task == "classification" else answers - {"samples.md"})
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"] == json.loads((run / "before.json").read_text())
    assert summary["before"] != summary["after"]
    assert summary["before"].keys() == summary["after"].keys()
    assert summary["trained_parameters"] < summary["parameters"] or trainable == "all"


def test_the_figures_of_a_task_are_of_its_splits(tuned):
    run, _ = tuned("instruction", "lora")
    entries = json.loads((run / "responses.json").read_text())
    assert len(entries) == json.loads((run / "summary.json").read_text())["after"]["test"]["responses"] == 4
    known = {row["instruction"]: row["output"] for row in instructions()}
    assert all(known[entry["instruction"]] == entry["output"] for entry in entries)
    assert all(isinstance(entry["model_response"], str) for entry in entries)
    run, _ = tuned("classification", "last_block")
    after = json.loads((run / "summary.json").read_text())["after"]
    assert after.keys() == {"train", "validation", "test"}
    assert sum(np.array(split["confusion"]).sum() for split in after.values()) == 60
    for split in after.values():
        confusion = np.array(split["confusion"])
        assert split["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())
        assert split["loss"] > 0


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
    kernels = {f"blocks/{name}/kernel" for name in ("attn/q", "attn/k", "attn/v", "attn/out_proj", "ff/fc", "ff/proj")}
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
    before = contents(run)
    assert cli.main(["finetune", *arguments]) == 0
    assert f"has done its {STEPS} steps" in " ".join(capsys.readouterr().out.split())
    assert contents(run) == before


def test_an_instruction_run_writes_text(tuned, capsys):
    run, _ = tuned("instruction", "lora")
    assert load_run(run).template.to_dict().items() >= TEMPLATE.items()
    assert cli.main(["generate", "--run", str(run), "--prompt", "Q: a", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Q: a")


def test_what_is_exported_is_the_whole_model_merged(tuned, tmp_path):
    run, _ = tuned("instruction", "lora")
    assert cli.main(["export", "--run", f"{run}@{STEPS}", "--out", str(tmp_path / "hf")]) == 0
    cfg, exported = load_gpt2(tmp_path / "hf")
    table = from_leaf_table(read_metadata(run / "checkpoints", STEPS)["leaves"])
    trained = load_params(run / "checkpoints", STEPS, table)
    parts = merge_params(read_tree(run / "frozen.safetensors"), trained)  # adapters beside their matrices
    apply = jax.jit(lambda params: GPTModel(cfg).apply({"params": params}, jnp.arange(24).reshape(2, 12)))
    beside = apply(jax.tree.map(jnp.asarray, parts))
    assert np.abs(apply(exported) - beside).max() <= 1e-5 * np.abs(beside).max()
    assert flat(exported).keys() == flat(load(run, "instruction")[1]).keys()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_adapters_of_every_matrix_resume_load_and_export(place, tmp_path, task):
    """Also of a head, which is no stack of matrices; a language model has one where its weights are not tied."""
    save_new(tmp_path / "base", load_run(place / "base").tokenizer, tie_weights=False)
    arguments = options(place, task, tmp_path, "lora", base=tmp_path / "base", lora__targets="*", sample__every=0)
    for steps in ("2", "4"):
        assert cli.main(["finetune", *arguments, "--train.steps", steps]) == 0
    run = tmp_path / "tuned"
    assert json.loads((run / "summary.json").read_text())["step"] == 4
    if task == "classification":
        assert load_classifier(run)(["abc"])[0].label in ("letters", "digits")
    else:
        assert load_model(run).step in (2, 4)

    out = tmp_path / "adapter"
    assert cli.main(["export", "--run", f"{run}@4", "--format", "adapter", "--out", str(out)]) == 0
    base = split_adapters(read_tree(run / "frozen.safetensors"))[0]
    merged = flat(merge_adapters(add_adapters(base, load_adapters(out / "adapter.safetensors"))))
    loaded = flat(load(run, task)[1])
    for path, leaf in loaded.items():
        assert merged[path].tobytes() == leaf.tobytes(), path
    head = "class_head/kernel" if task == "classification" else "out_head/kernel"
    assert (merged[head] != flat(base)[head]).any()


# Killed and resumed

KILL = """
import os, signal, sys
from slm_jax import cli
from slm_jax.training.record import RunLog

log = RunLog.train

def log_and_die(self, step, metrics):
    log(self, step, metrics)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

RunLog.train = log_and_die
cli.main(sys.argv[1:])
"""


def outcome(run):
    """All that must be equal of two runs."""
    step = saved_steps(run / "checkpoints")[-1]
    saved = ocp.load_checkpointables(run / "checkpoints" / str(step), {"params": None, "state": None})
    arrays = jax.tree_util.tree_leaves_with_path(saved)
    texts = ("samples.md", "responses.json", "responses-before.json", "before.json")
    return {
        "arrays": [(jax.tree_util.keystr(path), np.asarray(leaf).tobytes()) for path, leaf in arrays],
        "data": read_metadata(run / "checkpoints", step)["data"],
        "metrics": metrics(run),
        "texts": [(run / name).read_text() for name in texts if (run / name).exists()],
        "after": json.loads((run / "summary.json").read_text())["after"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(("task", "trainable"), [*QUICK, ("preference", "lora")])
def test_killed_equals_unbroken_bitwise(place, tuned, tmp_path, task, trainable):
    """SIGKILL after step 5; it resumes from what was saved by then, without its base."""
    unbroken, _ = tuned(task, trainable)
    shutil.copytree(place / "base", tmp_path / "base")
    arguments = options(place, task, tmp_path, trainable, base=tmp_path / "base")
    script = KILL.format(step=KILLED_AT)
    process = subprocess.run([sys.executable, "-c", script, "finetune", *arguments], capture_output=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert saved_steps(tmp_path / "tuned" / "checkpoints")[-1] in (3, 4)
    assert not (tmp_path / "tuned" / "summary.json").exists()
    shutil.rmtree(tmp_path / "base")
    assert cli.main(["finetune", *arguments]) == 0
    found, expected = outcome(tmp_path / "tuned"), outcome(unbroken)
    for name in expected:
        assert found[name] == expected[name], name


def test_on_a_fresh_machine_it_resumes_from_the_mirror(tuned, tmp_path):
    """With what is frozen, the template and what was measured before; its base is gone."""
    run, arguments = tuned("instruction", "lora")
    there = shutil.copytree(run, tmp_path / "drive" / "tuned")
    shutil.rmtree(there / "checkpoints" / str(STEPS))
    (there / "summary.json").unlink()
    moved = ["--runs_dir", str(tmp_path / "fresh"), "--checkpoint.mirror", str(tmp_path / "drive")]
    assert cli.main(["finetune", *arguments, *moved]) == 0
    for folder in (tmp_path / "fresh" / "tuned", there):
        assert outcome(folder) == outcome(run)
        assert json.loads((folder / "summary.json").read_text())["before"] is not None
        assert (folder / "frozen.safetensors").read_bytes() == (run / "frozen.safetensors").read_bytes()


# What a run does not resume from


@pytest.fixture
def stopped(tuned, tmp_path):
    """A copy of a finished run that is asked for more steps."""
    run, arguments = tuned("classification", "last_block")
    shutil.copytree(run, tmp_path / "tuned")
    at = arguments.index("--runs_dir") + 1
    return tmp_path / "tuned", [*arguments[:at], str(tmp_path), *arguments[at + 1 :], "--train.steps", str(STEPS + 1)]


def test_frozen_parameters_that_are_damaged_gone_or_anothers_are_refused(stopped, capsys):
    run, arguments = stopped
    whole, logged = (run / "frozen.safetensors").read_bytes(), (run / "metrics.jsonl").read_bytes()
    for content in (whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], whole[:-1], b""):
        (run / "frozen.safetensors").write_bytes(content)
        fails(["finetune", *arguments], capsys, "frozen.safetensors", "restore")
    (run / "frozen.safetensors").unlink()
    fails(["finetune", *arguments], capsys, "frozen.safetensors: no such file")
    (run / "frozen.safetensors").write_bytes(whole)
    other = jax.tree.map(lambda leaf: leaf + 1, read_tree(run / "frozen.safetensors"))  # of the same shapes, and whole
    write_tree(run / "frozen.safetensors", other)
    for command in (["classify", "--run", str(run), "abc"], ["finetune", *arguments]):
        fails(command, capsys, "frozen.safetensors: is not what this run was trained with", "restore it")
    assert (run / "metrics.jsonl").read_bytes() == logged


def test_a_summary_of_fewer_steps_is_not_taken_for_the_end(stopped):
    run, arguments = stopped
    arguments = [*arguments, "--train.steps", str(STEPS)]
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "step": STEPS - 1, "after": None}))
    assert cli.main(["finetune", *arguments]) == 0
    found = json.loads((run / "summary.json").read_text())
    assert (found["step"], found["after"]) == (STEPS, summary["after"])


@pytest.mark.slow
def test_a_run_has_its_own_template(place, tmp_path, capsys):
    file = tmp_path / "template.json"
    file.write_text(json.dumps(TEMPLATE))
    arguments = options(place, "instruction", tmp_path, instruction__template=file, sample__every=0)
    assert cli.main(["finetune", *arguments, "--train.steps", "2"]) == 0
    own = (tmp_path / "tuned" / "template.json").read_bytes()

    file.write_text(json.dumps({**TEMPLATE, "user_start": "A: "}))
    fails(["finetune", *arguments, "--train.steps", "4"], capsys, f"instruction.template {file} has changed", "--run")
    file.unlink()
    assert cli.main(["finetune", *arguments, "--train.steps", "4"]) == 0
    assert (tmp_path / "tuned" / "template.json").read_bytes() == own
    assert load_run(tmp_path / "tuned").template.user_start == "Q: "


# The tiny model that is not there yet


@pytest.fixture
def begun(monkeypatch):
    """The runs that would be trained: together they take minutes."""
    begun = []
    monkeypatch.setattr(finetune.train, "run", lambda options: begun.append(options) or 0)
    return begun


def config(folder, base="tiny", **more):
    return FinetuneConfig(base=None if base is None else str(folder / base), runs_dir=str(folder), **more)


def test_the_tiny_model_is_pretrained_first_if_it_is_missing(tmp_path, begun, monkeypatch, capsys):
    tiny = RunConfig(run="tiny", runs_dir=str(tmp_path))
    assert finetune.run(config(tmp_path)) == 0
    assert begun == [tiny, config(tmp_path)]
    assert "pretraining the tiny model first" in capsys.readouterr().err
    monkeypatch.setattr(finetune.train, "run", lambda options: begun.append(options) or 130)
    assert finetune.run(config(tmp_path)) == 130  # if that is stopped, it ends
    assert begun[2:] == [tiny]


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("classification", {"data": DataConfig(source="csv:nowhere.csv")}, "nowhere.csv"),
        ("instruction", {"data": DataConfig(source="json:nowhere.json")}, "nowhere.json"),
        ("instruction", {"instruction": InstructionConfig(template="alpaka")}, "alpaka"),
    ],
)
def test_a_mistake_in_the_data_is_found_before_that(tmp_path, begun, task, more, message):
    with pytest.raises(InputError, match=message):
        finetune.run(config(tmp_path, task=task, **more))
    assert begun == []


def test_only_a_missing_or_half_done_tiny_model_is_trained(tmp_path, begun):
    def first(config):
        begun.clear()
        assert finetune.run(config) == 0
        return begun[:-1]

    runs, tiny = tmp_path / "tiny", RunConfig(run="tiny", runs_dir=str(tmp_path))
    assert first(config(tmp_path, "mine")) == first(config(tmp_path, None, trainable="all")) == []
    runs.mkdir()
    assert first(config(tmp_path)) == []  # not ours to fill
    (runs / "config.yaml").write_text(dump_config(tiny))
    assert first(config(tmp_path)) == [tiny]
    for place in ("drive", "."):  # a run that resumes needs no base, also where only the mirror has it
        (tmp_path / place / config(tmp_path).name / "checkpoints").mkdir(parents=True)
        assert first(config(tmp_path, checkpoint=CheckpointConfig(mirror=str(tmp_path / "drive")))) == []
        shutil.rmtree(tmp_path / place / config(tmp_path).name)
    (runs / "summary.json").write_text("{}")
    assert first(config(tmp_path)) == []
