"""What must hold of where a run starts: what was looked at is what is trained."""

import pytest
from rich.console import Console

from slm_jax import cli
from slm_jax.config import (
    CheckpointConfig,
    DataConfig,
    ModelSection,
    OptimizerConfig,
    RunConfig,
    SampleConfig,
    TokenizerConfig,
    TrainConfig,
    dump_config,
)
from slm_jax.errors import InputError
from slm_jax.tasks import pretraining
from slm_jax.training.checkpoint import saved_steps
from slm_jax.training.interrupt import StopRequest
from slm_jax.training.loop import train
from slm_jax.training.start import find_start


def config(folder, steps):
    (folder / "text.txt").write_text("a bad cafe\n" * 40)
    return RunConfig(
        run="run",
        runs_dir=str(folder),
        data=DataConfig(source=f"text:{folder / 'text.txt'}"),
        tokenizer=TokenizerConfig(kind="char"),
        model=ModelSection(n_layers=1, emb_dim=8, n_heads=2, context_length=8),
        train=TrainConfig(steps=steps, batch_size=2, eval_every=2),
        optimizer=OptimizerConfig(warmup_steps=0),
        checkpoint=CheckpointConfig(every=2),
        sample=SampleConfig(every=0),
    )


def train_in_another_process(folder, steps):
    """The same run, by its command."""
    (folder / "config.yaml").write_text(dump_config(config(folder, steps)))
    assert cli.main(["train", "--config", str(folder / "config.yaml")]) == 0


@pytest.mark.parametrize("done", [0, 2])
def test_a_run_that_another_process_has_just_trained_is_left_as_it_is(tmp_path, done):
    """It trained between this one's look at the folder and its lock."""
    if done:
        train_in_another_process(tmp_path, done)
    mine = config(tmp_path, done + 2)
    start = find_start(mine)
    assert (start.step or 0) == done
    start.check_unchanged()
    task = pretraining.build(mine, start)

    train_in_another_process(tmp_path, done + 2)
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with StopRequest() as stop, pytest.raises(InputError, match="another process has just trained this run; start ag"):
        train(mine, task, start, stop, Console(quiet=True))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert find_start(mine).saved == tuple(saved_steps(run / "checkpoints"))
    find_start(mine).check_unchanged()
