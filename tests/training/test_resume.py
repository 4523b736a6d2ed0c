"""What must hold of a resume: the latest whole checkpoint of the same run, from the run's folder or its mirror."""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from pretraining import metrics
from refusals import contents
from rich.console import Console
from sharing import make_once

from slm_jax import cli
from slm_jax.config import dump_config, to_dict
from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.errors import InputError, MissingInputError
from slm_jax.tasks.config import RunConfig, get_task, parse_args
from slm_jax.training import loop, mirror
from slm_jax.training.checkpoint import Checkpoints, DamagedCheckpoint, best_step
from slm_jax.training.config import CheckpointConfig, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from slm_jax.training.loop import train
from slm_jax.training.manifest import CHECKSUMS, METADATA, find_damage, saved_steps, write_manifest
from slm_jax.training.mirror import FolderCopy, Mirror
from slm_jax.training.process import StopRequest
from slm_jax.training.resume import check_identity, find_start
from slm_jax.training.run_folder import RunFolder
from slm_jax.training.step import TrainState

# Identity


def test_what_a_run_is_changes_its_identity_and_how_it_is_executed_does_not():
    own, place = RunConfig().identity, Path("a")
    execution = (
        "--train.steps 5 --train.epochs 3 --train.accumulate 2 --train.log_every 1 --train.profile 1:2 --run b "
        "--runs_dir /x --resume must --model.dtype bfloat16 --model.remat full --checkpoint.every 3 "
        "--logging.tensorboard true --mesh.fsdp 2 --sample.prompt x --train.eval_batch_size 3"
    )
    check_identity(place, own, parse_args(execution.split()).identity)
    for option, difference in {
        "--seed 1": "seed is 1 now and was 0",
        "--train.batch_size 7": f"train.batch_size is 7 now and was {RunConfig().train.batch_size}",
        "--optimizer.clip_norm null": "optimizer.clip_norm is null now and was 1.0",
        "--data.source text:a.txt": "data.source is 'text:a.txt' now and was 'builtin:python-docs'",
        "--tokenizer.kind char": "tokenizer.kind is 'char' now and was 'bpe'",
        "--base runs/x": "base is 'runs/x' now and was null",
    }.items():
        with pytest.raises(InputError, match=f"a holds another run: {re.escape(difference)}; "):
            check_identity(place, own, parse_args(option.split()).identity)
    for one, other in (({"a": 1}, {"a": 1, "b": 2}), ({"a": 1, "b": 2}, {"a": 1})):
        with pytest.raises(InputError, match="b is"):
            check_identity(place, one, other)


@pytest.mark.parametrize(
    ("args", "read", "unread"),
    [
        ("--task classification", "classification.pooling", "instruction.packing"),
        ("--task instruction", "instruction.packing", "classification.pooling"),
        ("--base b --trainable lora", "lora.rank", "trainable_blocks"),
        ("--base b --trainable last_n_blocks", "trainable_blocks", "lora.rank"),
        ("--optimizer.kind muon", "optimizer.muon_learning_rate", "classification.pooling"),
    ],
)
def test_a_run_is_identified_by_what_it_reads(args, read, unread):
    identity = parse_args(args.split()).identity
    assert read in identity
    assert unread not in identity
    assert "instruction.responses" not in identity
    assert {"task", "base", "trainable"} <= identity.keys()
    assert json.loads(json.dumps(identity)) == identity  # it is compared with a checkpoint's metadata


# Where a run starts


def config(folder, steps, runs="runs", **more):
    """The same run on a machine that has ``runs``, with a mirror."""
    return RunConfig(
        run="run",
        runs_dir=str(folder / runs),
        data=DataConfig(source=f"text:{folder / 'text.txt'}"),
        tokenizer=TokenizerConfig(kind="char"),
        model=ModelConfig(n_layers=1, emb_dim=8, n_heads=2, context_length=8),
        train=TrainConfig(steps=steps, batch_size=2, eval_every=2, log_every=1),
        optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"),
        sample=SampleConfig(every=0),
        **{"checkpoint": CheckpointConfig(every=2, keep=2, mirror=str(folder / "drive")), **more},
    )


def run(cfg):
    file = Path(cfg.runs_dir).parent / "recipe.yaml"
    file.write_text(dump_config(cfg))
    return cli.main(["train", "--config", str(file)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of eight steps on one machine, unbroken, and its mirror."""

    def make(folder):
        (folder / "text.txt").write_text("a bad cafe\n" * 40)
        assert run(config(folder, 8)) == 0

    return make_once(tmp_path_factory, "resume-trained", make)


@pytest.fixture
def place(trained, tmp_path):
    """A copy that may be changed; the text lies where it was."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def configured(place, trained):
    """Return what makes the run's configuration; the path of its text is a part of its identity."""

    def make(steps=8, runs="runs", **more):
        data = DataConfig(source=f"text:{trained / 'text.txt'}")
        return dataclasses.replace(config(place, steps, runs), data=data, **more)

    return make


def damage(checkpoint):
    payload = max((p for p in checkpoint.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    payload.write_bytes(b"x" * payload.stat().st_size)


def leave_at(folder, step):
    """Take back what a run has done after a step."""
    for path in (folder / "run" / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


@pytest.fixture
def second_host(monkeypatch):
    """This process is the second of two; the first one finds the checkpoint of step 8."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for name, result in {
        "sync_global_devices": lambda _: None,
        "broadcast_one_to_all": lambda _: np.array(8),
        "process_allgather": lambda here: np.array([8, int(here)]),
    }.items():
        monkeypatch.setattr(multihost_utils, name, result)


def test_one_host_verifies_checkpoints_and_the_others_only_see_that_they_are_there(place, configured, second_host):
    damage(place / "runs" / "run" / "checkpoints" / "8")  # which the first host would have noticed
    start = find_start(configured())
    assert (start.step, start.metadata["identity"]["seed"]) == (8, 0)
    leave_at(place / "runs", 7)
    with pytest.raises(InputError, match="hosts see different checkpoints"):
        find_start(configured())


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(place, trained, configured, capsys):
    alone = CheckpointConfig(every=2)
    damage(place / "runs/run/checkpoints/8")
    assert run(configured(10, checkpoint=alone)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"warning: \S+/checkpoints/8.{,400}; resuming from an earlier checkpoint .*resuming from step 6", out
    )
    assert [row["step"] for row in metrics(place / "runs/run") if row["split"] == "train"] == list(range(1, 11))
    for step in (6, 8, 10):
        if (place / f"runs/run/checkpoints/{step}").exists():
            damage(place / f"runs/run/checkpoints/{step}")
    assert run(configured(12, checkpoint=alone)) == 2
    assert "every checkpoint is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil", [damage, lambda path: (path / CHECKSUMS).unlink(), lambda path: (path / METADATA).write_text("")]
)
def test_an_older_checkpoint_that_is_damaged_is_set_aside_and_stops_no_run(place, configured, spoil):
    spoil(place / "runs/run/checkpoints/6")
    start = find_start(configured())
    assert (start.step, start.whole) == (8, (8,))
    (note,) = start.notes
    assert re.fullmatch(r"warning: \S+/checkpoints/6.*; set aside", note)
    start.folder.set_aside_all_but(start.whole)
    with Checkpoints(start.folder.checkpoints) as checkpoints:
        assert checkpoints.saved_steps() == [8]


def test_a_run_whose_only_save_was_not_finished_starts_from_the_beginning(place, configured):
    alone = configured(checkpoint=CheckpointConfig())
    leave_at(place / "runs", 6)
    (place / "runs/run/checkpoints/6" / CHECKSUMS).unlink()
    start = find_start(alone)
    assert (start.step, start.whole) == (None, ())
    assert [note.rpartition("; ")[2] for note in start.notes] == ["set aside", "the run starts from the beginning"]


def test_a_run_that_was_killed_before_its_first_step_starts_again(place, configured, monkeypatch):
    """Whatever it has written until then."""
    for stop_at in ("open_loggers", "RunLog", "Checkpoints"):
        mine = configured(2, f"new-{stop_at}", checkpoint=CheckpointConfig())
        start = find_start(mine)
        task = get_task("pretraining").build(mine, start)
        with monkeypatch.context() as patch, StopRequest() as stop:
            patch.setattr(loop, stop_at, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                train(mine, task, start, stop, Console(quiet=True))
        assert find_start(mine).step is None


def test_a_log_that_was_changed_is_reported(place, configured):
    assert find_start(configured()).notes == ()
    log = place / "runs/run/metrics.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1', 1))
    (note,) = find_start(configured()).notes
    assert note == f"warning: {log} has changed since step 8 was saved; intact lines are kept"


def test_never_refuses_a_run_and_must_needs_one(place, configured):
    with pytest.raises(InputError, match="runs/run already holds a run and resume is never"):
        find_start(configured(resume="never"))
    for folder in ("runs", "drive"):
        shutil.rmtree(place / folder / "run")
    with pytest.raises(MissingInputError, match="no checkpoint to resume from, and resume is must"):
        find_start(configured(resume="must"))
    assert find_start(configured()).step is None


def test_what_is_left_of_a_removed_run_does_not_count(place, configured):
    for folder in ("runs", "drive"):
        shutil.rmtree(place / folder / "run")
    (place / "runs" / "run" / "checkpoints" / ".saving").mkdir(parents=True)
    assert find_start(configured()).step is None


@pytest.mark.parametrize("where", ["runs", "drive"])
def test_something_else_in_the_folder_is_not_touched(place, configured, where):
    shutil.rmtree(place / where / "run")
    (place / where / "run").mkdir()
    (place / where / "run" / "holiday.jpg").write_text("")
    with pytest.raises(InputError, match=f"{where}/run is not empty and holds no run"):
        find_start(configured())
    shutil.rmtree(place / where / "run")
    (place / where / "run").write_text("")
    with pytest.raises(InputError, match=f"{where}/run is a file"):
        find_start(configured())


def test_another_run_of_that_name_in_the_mirror_is_refused_and_left_as_it_is(place, configured, capsys):
    shutil.rmtree(place / "runs" / "run")
    before = contents(place / "drive")
    assert run(configured(10, seed=1)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{place}/drive/run holds another run: seed is 1 now and was 0" in line
    assert contents(place / "drive") == before


def test_two_unrelated_runs_here_and_there_are_not_taken_for_one(place, configured):
    shutil.rmtree(place / "runs")
    assert run(configured(4, seed=1, checkpoint=CheckpointConfig(every=2))) == 0
    before = contents(place)
    for seed in (0, 1):
        with pytest.raises(InputError, match=r"drive/run holds another run: seed is"):
            find_start(configured(12, seed=seed))
    assert contents(place) == before


def test_a_run_that_another_process_has_just_trained_is_left_as_it_is(place, trained, configured):
    leave_at(place / "runs", 6)
    leave_at(place / "drive", 6)
    mine = configured(10)
    start = find_start(mine)
    assert start.step == 6
    task = get_task("pretraining").build(mine, start)
    shutil.copytree(trained / "runs" / "run", place / "runs" / "run", dirs_exist_ok=True)
    before = contents(place / "runs" / "run")
    with StopRequest() as stop, pytest.raises(InputError, match="another process has just trained this run"):
        train(mine, task, start, stop, Console(quiet=True))
    after = contents(place / "runs" / "run")
    assert {**after, ".lock": None} == {**before, ".lock": None}


# Warnings


def change_metadata(checkpoint, **changes):
    content = json.loads((checkpoint / METADATA).read_text())
    content["custom_metadata"] |= changes
    (checkpoint / METADATA).write_text(json.dumps(content))
    write_manifest(checkpoint, int(checkpoint.name))


def test_a_configuration_that_was_cut_is_reported(place, configured):
    file = place / "runs" / "run" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: lines.index("sample:\n")]))
    (note,) = find_start(configured()).notes
    assert "config.yaml is damaged: sample.every is missing" in note
    other = dataclasses.replace(SampleConfig(), every=3)
    file.write_text(dump_config(configured(sample=other)))  # a key that may change, and a run killed before it saved
    assert find_start(configured()).notes == ()


@pytest.mark.parametrize(
    ("was", "expected"),
    [
        ({"device": "TPU v5 lite", "threads": 96}, "device TPU v5 lite, threads 96; here device"),
        ({"devices": 8}, "devices 8; here devices"),
        ({"python": "3.9.1", "optax": "0.1"}, None),
    ],
)
def test_a_checkpoint_of_a_machine_that_rounds_differently_is_reported(place, configured, was, expected):
    checkpoint = place / "runs" / "run" / "checkpoints" / "8"
    environment = json.loads((checkpoint / METADATA).read_text())["custom_metadata"]["environment"]
    change_metadata(checkpoint, environment={**environment, **was})
    notes = find_start(configured()).notes
    assert len(notes) == (expected is not None)
    if expected:
        assert expected in notes[0]
        assert "not bit for bit" in notes[0]


@pytest.mark.parametrize(
    ("step", "kept", "expected"),
    [
        (6, [2, 6], "--base {}/run@2 --base_optimizer true --optimizer.warmup_steps 0 --run NAME"),
        (6, [6], "--checkpoint.keep"),
        (2, [2], None),
    ],
)
def test_more_steps_after_the_decay_are_reported_with_a_better_way(tmp_path, step, kept, expected):
    """Of 8 steps the last 4 are the decay; 20 are requested now."""
    optimizer = OptimizerConfig(warmup_steps=0, schedule="wsd", decay_steps=4)
    cfg = dataclasses.replace(config(tmp_path, 20, ".", checkpoint=CheckpointConfig()), optimizer=optimizer)
    saved = {"config": to_dict(dataclasses.replace(cfg, train=TrainConfig(steps=8))), "identity": cfg.identity}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        for at in kept:
            checkpoints.save(TrainState(jnp.int32(at), {"kernel": jnp.ones(3)}, (), jax.random.key(0)), saved)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(cfg))
    notes = find_start(cfg).notes
    assert len(notes) == (expected is not None)
    if expected:
        assert "falling since step 4 and rises to its peak again" in notes[0]
        assert expected.format(tmp_path) in notes[0]
    same = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=8))
    assert find_start(same).notes == ()


# The mirror


def steps(folder):
    return saved_steps(folder / "run" / "checkpoints")


def mirror_of(place, notes, keep=2):
    return Mirror(RunFolder(place / "runs" / "run"), FolderCopy(place / "drive" / "run"), keep, notes.append)


def test_a_fresh_machine_resumes_from_the_mirror_as_if_nothing_had_happened(place, trained, configured, capsys):
    here, drive = (contents(trained / name / "run") for name in ("runs", "drive"))
    assert drive == {name: content for name, content in here.items() if not name.startswith(".lock")}
    leave_at(place / "drive", 6)
    assert run(configured(8, "fresh")) == 0
    assert f"step 6 was copied from {place}/drive/run" in capsys.readouterr().out.replace("\n", " ")
    assert metrics(place / "fresh/run") == metrics(trained / "runs/run")
    assert steps(place / "fresh") == steps(trained / "runs") == steps(place / "drive")


def test_the_newer_of_run_and_mirror_wins(place, configured):
    leave_at(place / "drive", 6)
    start = find_start(configured())
    assert (start.step, start.notes) == (8, ())
    shutil.copytree(place / "runs/run/checkpoints/8", place / "drive/run/checkpoints/8")
    damage(place / "runs/run/checkpoints/8")
    start = find_start(configured(), {8: "damaged"})  # found when it was loaded
    assert start.step == 8
    assert find_damage(place / "runs/run/checkpoints/8") is None
    assert any("8.damaged" in path.name for path in (place / "runs/run/checkpoints").iterdir())


def test_the_best_is_copied_along(place, configured):
    """Training would never save it again."""
    change_metadata(place / "drive/run/checkpoints/6", validation_loss=0.001)
    assert find_start(configured(8, "fresh")).step == 8
    assert steps(place / "fresh") == [6, 8]
    assert best_step(place / "fresh/run/checkpoints") == 6


def test_a_damaged_checkpoint_in_the_mirror_is_not_copied(place, configured):
    damage(place / "drive/run/checkpoints/8")
    start = find_start(configured(8, "fresh"))
    assert start.step == 6
    assert f"{place}/drive/run/checkpoints/8" in start.notes[0]
    damage(place / "drive/run/checkpoints/6")
    shutil.rmtree(place / "fresh")
    for _ in range(2):  # what it leaves is no run
        with pytest.raises(InputError, match=r"drive/run: every checkpoint is damaged"):
            find_start(configured(8, "fresh"))


def test_arrays_damaged_in_the_run_and_in_its_mirror_stop_the_run(place, configured, monkeypatch, capsys):
    tried = []

    def restore(self, step, like):
        tried.append(step)
        raise DamagedCheckpoint(f"{step} is damaged")

    leave_at(place / "runs", 6)
    leave_at(place / "drive", 6)
    monkeypatch.setattr(Checkpoints, "restore", restore)
    assert run(configured()) == 2
    assert tried == [6, 6]
    assert "6 is damaged, and so is the mirror's copy; delete both" in capsys.readouterr().err


def test_a_failing_mirror_is_a_warning_and_the_next_update_catches_up(place, monkeypatch):
    notes = []
    copies = mirror_of(place, notes)
    (place / "drive").rename(place / "gone")
    for last in (False, False, True):  # the second is within a minute
        copies.update(last=last)
    assert len(notes) == 2
    assert all("cannot be copied there now" in note for note in notes)
    (place / "drive").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(mirror.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        copies.update(last=True)
    assert "full" in notes[-1]
    assert steps(place / "drive") == []
    copies.update()
    assert contents(place / "drive/run").keys() == contents(place / "gone/run").keys()


def test_a_copy_that_was_damaged_on_the_way_never_gets_its_name(place, monkeypatch):
    notes, copy = [], shutil.copyfile

    def spoil(source, target):
        copy(source, target)
        if "params" in str(target):
            target.write_bytes(b"x" * target.stat().st_size)

    shutil.rmtree(place / "drive/run/checkpoints/8")
    monkeypatch.setattr(mirror.shutil, "copyfile", spoil)
    mirror_of(place, notes).update()
    assert "SHA-256" in notes[0]
    assert {path.name for path in (place / "drive/run/checkpoints").iterdir()} == {"6"}


def test_old_checkpoints_are_removed_as_in_the_run_and_interrupted_copies_too(place):
    drive = place / "drive/run/checkpoints"
    for step in (1, 2, 3):
        shutil.copytree(drive / "6", drive / str(step))
        change_metadata(drive / str(step), validation_loss={1: 0.001}.get(step, 9.0))
    (drive / "7.partial").mkdir()
    shutil.rmtree(place / "runs/run/checkpoints/6")
    mirror_of(place, []).update()
    assert {path.name for path in drive.iterdir()} == {"1", "6", "8"}  # the best, and the latest two


@pytest.mark.parametrize("mirror", ["runs", "runs/run/inside", "missing/parent"])
def test_a_mirror_that_cannot_be_one_is_refused(place, configured, mirror):
    with pytest.raises(InputError, match=r"checkpoint\.mirror is"):
        find_start(configured(checkpoint=CheckpointConfig(mirror=str(place / mirror))))


@pytest.mark.parametrize("found", [[8, 6], [-1, 8]])
def test_hosts_that_see_different_checkpoints_are_refused(configured, monkeypatch, found):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda step: step)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: jnp.array(found))
    with pytest.raises(InputError, match=f"the hosts see different checkpoints .{found[0]}, {found[1]}"):
        find_start(configured())
