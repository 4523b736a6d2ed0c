"""The doctor's checks of a run: they find what is damaged, and name the command that resumes it."""

import json
import shutil

import jax
import pytest
from pretraining import options
from refusals import contents

from slm_jax import cli
from slm_jax.model import GPTConfig, init_params
from slm_jax.runs import Run, save_run
from slm_jax.tokenizer import CharTokenizer
from slm_jax.tools.doctor.run_checks import check_machine, check_next, examine_run
from slm_jax.training.manifest import write_manifest
from slm_jax.training.run_folder import RunFolder

TEXT = "the cat sat on the mat, and the dog sat on the log. " * 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps with a mirror."""
    folder = tmp_path_factory.mktemp("machine")
    (folder / "cats.txt").write_text(TEXT)
    (folder / "drive").mkdir()
    small = {"run": "cats", "model__n_layers": 1, "model__emb_dim": 8, "model__n_heads": 1, "model__context_length": 8}
    small |= {"train__steps": 6, "train__eval_every": 3, "checkpoint__every": 3, "sample__every": 0}
    small |= {"checkpoint__mirror": folder / "drive"}
    assert cli.main(["train", *options(folder / "cats.txt", folder / "runs", **small)]) == 0
    return folder


@pytest.fixture
def machine(trained, tmp_path):
    """A copy of it at the same relative places, to be damaged."""
    shutil.copytree(trained, tmp_path / "machine")
    config = tmp_path / "machine" / "runs" / "cats" / "config.yaml"
    text = config.read_text()
    for place in ("runs", "drive"):
        text = text.replace(str(trained / place), str(tmp_path / "machine" / place))
    config.write_text(text)
    return tmp_path / "machine"


@pytest.fixture
def run(machine):
    return machine / "runs" / "cats"


def examine(path):
    """What is found, by name; every text is one line and no check broke."""
    found = {}
    for finding in examine_run(RunFolder(path)):
        assert "\n" not in finding.text
        assert "the check itself failed" not in finding.text
        found.setdefault(finding.name, []).append(finding)
    return found


def problems(found):
    return [finding.text for findings in found.values() for finding in findings if finding.level == "problem"]


def test_an_intact_run_has_no_problem_and_is_not_changed(run):
    before = contents(run)
    found = examine(run)
    assert contents(run) == before
    assert {finding.level for findings in found.values() for finding in findings} == {"ok"}
    three, six = (finding.text for finding in found["checkpoints"])
    assert three.startswith("step 3, validation loss ")
    assert six.startswith("step 6, validation loss ")
    assert ["the latest" in text for text in (three, six)] == [False, True]
    assert ("the best" in three) != ("the best" in six)
    (log,) = found["log"]
    assert "up to step 6" in log.text
    assert found["machine"][0].text.endswith("as here: a resume is bit for bit the unbroken run")
    assert "drive/cats has step 3, step 6, each intact" in found["mirror"][0].text
    (next_step,) = found["next"]
    assert next_step.text.startswith(f"finished, 6 steps: slm-jax generate --run {run}")


def test_on_a_gpu_it_does_not_promise_equal_bits(run, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    ((_, text),) = check_machine(RunFolder(run))
    assert "apart from kernels that round differently" in text


def test_the_suggested_command_resumes_a_run_that_was_moved(run, tmp_path):
    moved = tmp_path / "elsewhere" / "dogs"
    shutil.copytree(run, moved)
    ((_, text),) = check_next(RunFolder(moved))
    assert f"--runs_dir {moved.parent} --run dogs" in text
    command = text.partition("for more: slm-jax ")[2].replace("--train.steps N", "--train.steps 7").split()
    assert cli.main(command) == 0
    ((_, text),) = check_next(RunFolder(moved))
    assert text.startswith("finished, 7 steps")


def test_a_damaged_checkpoint_is_named_and_no_intact_one_is_a_problem_of_its_own(run):
    file = max((run / "checkpoints" / "3").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    found = examine(run)
    (problem,) = problems(found)
    assert f"{file} is damaged" in problem
    assert f"delete {run / 'checkpoints' / '3'}, the others are not affected" in problem
    assert "intact" in found["checkpoints"][1].text
    (run / "checkpoints" / "6" / "_CHECKPOINT_METADATA").write_text("{}")
    assert "every checkpoint is damaged" in problems(examine(run))[-1]


def test_what_is_no_checkpoint_is_a_note(run):
    (run / "checkpoints" / "6" / "sha256.json").unlink()
    shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "4.damaged-1")
    found = examine(run)
    assert problems(found) == []
    (note,) = [finding.text for finding in found["checkpoints"] if finding.level == "note"]
    assert "2 damaged or unfinished (" in note
    assert "4.damaged-1" in note


def test_the_log_shows_skipped_steps_damage_and_steps_without_checkpoint(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["split"] == "train")
    first |= {"loss": None, "skipped": True}
    rows.append({**first, "step": 9, "loss": 1.0, "skipped": False})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + '{"step": 10, "sp\n')
    found = examine(run)["log"]
    assert [finding.level for finding in found] == ["problem", "ok", "note", "note"]
    assert f"1 of {len(rows) + 1} lines of metrics.jsonl are damaged" in found[0].text
    assert "not finite in 1 logged steps, which were skipped: 1;" in found[2].text
    assert found[3].text.startswith("3 steps after the latest checkpoint")


def test_another_machine_is_a_note(run):
    path = run / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    metadata["custom_metadata"]["environment"] |= {"device": "TPU v5 lite", "threads": 99}
    path.write_text(json.dumps(metadata))
    write_manifest(path.parent, 6)
    (finding,) = examine(run)["machine"]
    assert finding.level == "note"
    assert "trained on 1 × TPU v5 lite" in finding.text
    assert "(was TPU v5 lite)" in finding.text
    assert finding.text.endswith("not bit for bit")


def test_a_mirror_may_be_behind_damaged_or_gone(machine, run):
    mirror = machine / "drive" / "cats"
    shutil.rmtree(mirror / "checkpoints" / "6")
    (finding,) = examine(run)["mirror"]
    assert (finding.level, "not the latest, 6; the next start copies it" in finding.text) == ("note", True)
    (mirror / "checkpoints" / "3" / "sha256.json").write_text("")
    assert "step 3: " in problems(examine(run))[0]
    shutil.rmtree(machine / "drive")
    assert "does not exist; mount it" in problems(examine(run))[0]


def test_a_configuration_of_another_version_is_a_problem_and_a_run_in_training_is_left_alone(run):
    with RunFolder(run).lock():
        assert list(check_next(RunFolder(run))) == [("note", "another process is training it now")]
    assert [level for level, _ in check_next(RunFolder(run))] == ["ok"]
    config = run / "config.yaml"
    config.write_text(config.read_text() + "new_key: 1\n")
    (problem,) = problems(examine(run))  # once, not again by each check that needs the configuration
    assert "new_key" in problem


def test_imported_weights_and_a_run_that_has_just_begun(tmp_path):
    tokenizer = CharTokenizer("abc")
    cfg = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=4, emb_dim=4, n_heads=1, n_layers=1)
    save_run(tmp_path / "imported", Run(tmp_path, None, cfg, init_params(cfg, jax.random.key(0)), tokenizer))
    found = examine(tmp_path / "imported")
    assert problems(found) == []
    assert "weights only" in found["config"][0].text
    assert found["next"][0].text == f"slm-jax generate --run {tmp_path / 'imported'}"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("run: new\n")
    found = examine(tmp_path / "new")
    assert problems(found) == []
    assert found["checkpoints"][0].text.startswith("none yet")
    assert found["next"][0].text.startswith("at step 0 of 800; to resume: slm-jax train --config")
