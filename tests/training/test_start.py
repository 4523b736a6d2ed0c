"""What must hold of where a run starts: what was looked at is what is trained."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from slm_jax import cli
from slm_jax.config import dump_config, to_dict
from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.errors import InputError, MissingInputError
from slm_jax.tasks import pretraining
from slm_jax.tasks.config import RunConfig
from slm_jax.training.checkpoint import METADATA, Checkpoints, best_step, find_damage, saved_steps, write_checksums
from slm_jax.training.config import CheckpointConfig, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig
from slm_jax.training.interrupt import StopRequest
from slm_jax.training.loop import train
from slm_jax.training.start import find_start
from slm_jax.training.step import TrainState


def config(folder, steps):
    (folder / "text.txt").write_text("a bad cafe\n" * 40)
    return RunConfig(
        run="run",
        runs_dir=str(folder),
        data=DataConfig(source=f"text:{folder / 'text.txt'}"),
        tokenizer=TokenizerConfig(kind="char"),
        model=ModelConfig(n_layers=1, emb_dim=8, n_heads=2, context_length=8),
        train=TrainConfig(steps=steps, batch_size=2, eval_every=2),
        optimizer=OptimizerConfig(warmup_steps=0),
        checkpoint=CheckpointConfig(every=2),
        sample=SampleConfig(every=0),
    )


@pytest.mark.parametrize("done", [0, 6])
def test_a_run_that_another_process_has_just_trained_is_left_as_it_is(place, trained, done):
    """It trained between this one's look at the folder and its lock."""
    run = place / "runs" / "run"
    leave_at(place / "runs", done)
    if not done:
        shutil.rmtree(run)
    mine = dataclasses.replace(same_text(mirrored(place, 8), trained), checkpoint=CheckpointConfig(every=2, keep=2))
    start = find_start(mine)
    assert (start.step or 0) == done
    start.check_unchanged()
    task = pretraining.build(mine, start)

    shutil.copytree(trained / "runs" / "run", run, dirs_exist_ok=True)
    before = contents(run)
    with StopRequest() as stop, pytest.raises(InputError, match="another process has just trained this run; start ag"):
        train(mine, task, start, stop, Console(quiet=True))
    assert contents(run) == before
    assert find_start(mine).saved == tuple(saved_steps(run / "checkpoints"))
    find_start(mine).check_unchanged()


# The mirror


def mirrored(folder, steps, runs="runs", **more):
    """The same run on a machine that has ``runs``, with a mirror."""
    checkpoint = CheckpointConfig(every=2, keep=2, mirror=str(folder / "drive"))
    cfg = dataclasses.replace(config(folder, steps), checkpoint=checkpoint, runs_dir=str(folder / runs))
    optimizer = OptimizerConfig(warmup_steps=0, schedule="constant")
    return dataclasses.replace(cfg, optimizer=optimizer, train=dataclasses.replace(cfg.train, log_every=1), **more)


def run(cfg):
    file = Path(cfg.runs_dir).parent / "recipe.yaml"
    file.write_text(dump_config(cfg))
    return cli.main(["train", "--config", str(file)])


def log(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "mfu")} for row in rows]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of eight steps on one machine, unbroken, and its mirror."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(mirrored(folder, 8)) == 0
    return folder


@pytest.fixture
def place(trained, tmp_path):
    """A copy of them that may be changed; the text lies where it was."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.rglob("config.yaml"):
        file.write_text(file.read_text().replace(str(trained), str(tmp_path)))
    return tmp_path


def leave_at(folder, step):
    """Take back what a run has done after a step."""
    for path in (folder / "run" / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def damage(checkpoint):
    payload = max((p for p in checkpoint.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    payload.write_bytes(b"x" * payload.stat().st_size)


def same_text(cfg, trained):
    """The data key is identity: the text's path must be the one of the run."""
    return dataclasses.replace(cfg, data=DataConfig(source=f"text:{trained / 'text.txt'}"))


def test_a_fresh_machine_goes_on_from_the_mirror_as_if_nothing_had_happened(tmp_path, trained, capsys):
    assert run(same_text(mirrored(tmp_path, 4, "first"), trained)) == 0
    assert contents(tmp_path / "first" / "run").keys() - {".lock"} == contents(tmp_path / "drive" / "run").keys()
    capsys.readouterr()
    assert run(same_text(mirrored(tmp_path, 8, "second", resume="must"), trained)) == 0
    out = capsys.readouterr().out
    assert f"step 4 was copied from {tmp_path}/drive/run to {tmp_path}/second/run" in out
    assert "going on from step 4" in out
    assert log(tmp_path / "second") == log(trained / "runs")
    assert log(tmp_path / "drive") == log(trained / "runs")
    assert saved_steps(tmp_path / "drive" / "run" / "checkpoints")[-2:] == [6, 8]


def test_a_finished_run_is_fetched_and_done(place, trained, capsys):
    assert run(same_text(mirrored(place, 8, "fresh"), trained)) == 0
    assert "has done its 8 steps" in capsys.readouterr().out
    assert contents(place / "fresh" / "run").keys() > {"summary.json", "metrics.jsonl", "config.yaml", "loss.png"}
    assert saved_steps(place / "fresh" / "run" / "checkpoints")[-1] == 8


def test_a_mirror_that_was_away_at_the_end_is_completed_by_the_same_command(place, trained):
    leave_at(place / "drive", 6)
    (place / "drive" / "run" / "summary.json").unlink()
    assert run(same_text(mirrored(place, 8), trained)) == 0
    there = place / "drive" / "run"
    assert contents(there / "checkpoints") == contents(place / "runs" / "run" / "checkpoints")
    assert (there / "summary.json").is_file()


def test_training_ends_well_without_its_mirror_which_the_same_command_then_completes(
    tmp_path, trained, monkeypatch, capsys
):
    def run_out(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", run_out)
    cfg = same_text(mirrored(tmp_path, 8), trained)
    assert run(cfg) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("training goes on") == 1
    assert f"{tmp_path}/drive/run: nothing can be copied there since" in out
    assert "No space left on device" in out
    assert "free space there, then start the same command again" in out
    assert log(tmp_path / "runs") == log(trained / "runs")
    monkeypatch.undo()
    assert run(cfg) == 0
    assert "has done its 8 steps" in capsys.readouterr().out
    expected = contents(tmp_path / "runs" / "run")
    del expected[".lock"]
    assert contents(tmp_path / "drive" / "run") == expected


def find(place, trained, runs="runs", steps=8, **more):
    return find_start(same_text(mirrored(place, steps, runs, **more), trained))


def test_the_latest_whole_checkpoint_counts_wherever_it_lies(place, trained):
    start = find(place, trained)
    assert (start.step, start.source.path) == (8, place / "runs" / "run")  # of two the run's own
    leave_at(place / "drive", 6)
    assert (find(place, trained).step, find(place, trained).mirror) == (8, None)
    damage(place / "runs" / "run" / "checkpoints" / "8")
    start = find(place, trained)
    assert start.step == 6
    assert "checkpoints/8" in start.warnings[0]
    assert start.mirror is None


def test_a_damaged_one_here_is_replaced_by_the_mirrors(place, trained):
    damage(place / "runs" / "run" / "checkpoints" / "8")
    start = find(place, trained)
    assert (start.step, start.mirror.path) == (8, place / "drive" / "run")
    said = []
    fetched = start.fetched(start.metadata["identity"], said.append)
    assert len(said) == 1
    assert fetched.mirror is None
    fetched.check_unchanged()
    assert find_damage(place / "runs" / "run" / "checkpoints" / "8") is None
    assert any("8.damaged" in path.name for path in (place / "runs" / "run" / "checkpoints").iterdir())


def test_a_damaged_one_in_the_mirror_is_said_and_the_one_before_taken(place, trained):
    damage(place / "drive" / "run" / "checkpoints" / "8")
    start = find(place, trained, "fresh")
    assert start.step == 6
    assert f"{place}/drive/run/checkpoints/8" in start.warnings[0]
    assert "SHA-256" in start.warnings[0]
    for step in saved_steps(place / "drive" / "run" / "checkpoints"):
        if step != 8:
            damage(place / "drive" / "run" / "checkpoints" / str(step))
    with pytest.raises(InputError, match=r"drive/run/checkpoints: every checkpoint is damaged"):
        find(place, trained, "fresh")
    assert not (place / "fresh").exists()


def test_the_best_comes_along(place, trained):
    """Where it is not the latest: training would never save it again."""
    there = place / "drive" / "run" / "checkpoints"
    file = there / "6" / METADATA
    content = json.loads(file.read_text())
    content["custom_metadata"]["validation_loss"] = 0.001
    file.write_text(json.dumps(content))
    write_checksums(there / "6")
    start = find(place, trained, "fresh")
    start.fetched(start.metadata["identity"], lambda line: None)
    assert saved_steps(place / "fresh" / "run" / "checkpoints") == [6, 8]
    assert best_step(place / "fresh" / "run" / "checkpoints") == 6


def test_never_refuses_a_run_in_the_mirror_and_must_takes_it(place, trained):
    with pytest.raises(InputError, match=rf"{place}/drive/run already holds a run and resume is never"):
        find(place, trained, "fresh", resume="never")
    assert find(place, trained, "fresh", resume="must").step == 8
    shutil.rmtree(place / "drive" / "run")
    with pytest.raises(MissingInputError, match=r"fresh/run/checkpoints and .*drive/run/checkpoints: no checkpoint"):
        find(place, trained, "fresh", resume="must")
    assert find(place, trained, "fresh").step is None


def test_another_run_of_that_name_in_the_mirror_is_refused_and_left_as_it_is(place, trained, capsys):
    before = contents(place / "drive")
    assert run(same_text(mirrored(place, 10, "fresh", seed=1), trained)) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    for text in (f"{place}/drive/run holds another run", "seed is 1 now and was 0", "--run NAME"):
        assert text in err[0]
    assert not (place / "fresh").exists()
    assert contents(place / "drive") == before


@pytest.mark.parametrize("later", ["runs", "drive"])
def test_two_unrelated_runs_here_and_there_are_not_taken_for_one(place, trained, later):
    """Neither of them is overwritten, whichever has gone further."""
    shutil.rmtree(place / "runs")
    elsewhere = dataclasses.replace(
        mirrored(place, 4 if later == "drive" else 10, seed=1), checkpoint=CheckpointConfig(every=2)
    )
    assert run(same_text(elsewhere, trained)) == 0
    before = contents(place)
    for seed in (0, 1):
        with pytest.raises(InputError, match=r"holds another run than .*seed is .*another checkpoint\.mirror"):
            find(place, trained, seed=seed, steps=12)
    assert contents(place) == before


def test_something_else_in_the_mirror_is_not_touched(tmp_path):
    (tmp_path / "drive" / "run").mkdir(parents=True)
    (tmp_path / "drive" / "run" / "holiday.jpg").write_text("")
    with pytest.raises(InputError, match=rf"{tmp_path}/drive/run is not empty and holds no run"):
        find_start(mirrored(tmp_path, 4))
    shutil.rmtree(tmp_path / "drive" / "run")
    (tmp_path / "drive" / "run").write_text("")
    with pytest.raises(InputError, match=rf"{tmp_path}/drive/run is a file"):
        find_start(mirrored(tmp_path, 4))


def test_a_mirror_that_vanishes_before_it_is_copied_is_said_in_one_line(place, trained):
    start = find(place, trained, "fresh")
    (place / "drive").rename(place / "gone")
    with pytest.raises(InputError, match=rf"{place}/drive/run: cannot be copied to {place}/fresh/run") as caught:
        start.fetched(start.metadata["identity"], lambda line: None)
    assert "\n" not in str(caught.value)
    (place / "gone").rename(place / "drive")
    assert find(place, trained, "fresh").step == 8


# What has changed since


def change_metadata(checkpoint, **changes):
    content = json.loads((checkpoint / METADATA).read_text())
    for key, value in changes.items():
        content["custom_metadata"][key] = {**content["custom_metadata"][key], **value}
    (checkpoint / METADATA).write_text(json.dumps(content))
    write_checksums(checkpoint)


@pytest.mark.parametrize(
    ("was", "said"),
    [
        ({"device": "TPU v5 lite", "threads": 96}, "device TPU v5 lite, threads 96; here device"),
        ({"devices": 8}, "devices 8; here devices"),
        ({"python": "3.9.1", "optax": "0.1"}, None),
        ({}, None),
    ],
)
def test_another_machine_is_said_as_numbers_are_rounded_otherwise_there(place, trained, was, said):
    change_metadata(place / "runs" / "run" / "checkpoints" / "8", environment=was)
    warnings = find(place, trained).warnings
    assert len(warnings) == (said is not None)
    if said:
        assert said in warnings[0]
        assert "not bit for bit" in warnings[0]


@pytest.mark.parametrize(
    ("step", "kept", "said"),
    [
        (6, [2, 6], "--base {}/run@2 --base_optimizer true --optimizer.warmup_steps 0 --run NAME"),
        (6, [6], "kept by --checkpoint.keep"),
        (2, [2], None),
    ],
)
def test_more_steps_after_a_decay_are_said_with_the_better_way(tmp_path, step, kept, said):
    """Of 8 steps the last 4 are the decay; 20 are asked for now."""
    optimizer = OptimizerConfig(warmup_steps=0, schedule="wsd", decay_steps=4)
    cfg = dataclasses.replace(config(tmp_path, 20), optimizer=optimizer)
    saved = {"config": to_dict(dataclasses.replace(cfg, train=TrainConfig(steps=8))), "identity": {}}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        for at in kept:
            checkpoints.save(TrainState(jnp.int32(at), {"kernel": jnp.ones(3)}, (), jax.random.key(0)), saved)
    (tmp_path / "run" / "config.yaml").write_text("")
    warnings = find_start(cfg).warnings
    assert len(warnings) == (said is not None)
    if said:
        assert "falling since step 4 and rises to its peak again" in warnings[0]
        assert said.format(tmp_path) in warnings[0]
    same = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=8))
    assert find_start(same).warnings == ()
