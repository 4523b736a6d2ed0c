"""What must hold of a run's record: what is logged and printed of a step and an evaluation."""

import dataclasses
import io
import math

import grain
import jax.numpy as jnp
import pytest
from rich.console import Console

from slm_jax.model import GPTConfig
from slm_jax.tasks.config import RunConfig
from slm_jax.tokenizer import CharTokenizer
from slm_jax.training import hardware, record
from slm_jax.training.config import TrainConfig
from slm_jax.training.loggers import Logger
from slm_jax.training.progress import ProgressLine
from slm_jax.training.record import RunLog, TrainingDiverged
from slm_jax.training.run_folder import RunFolder
from slm_jax.training.step import StepMetrics
from slm_jax.training.task import EvaluationSums, Parameters, Task

CFG = GPTConfig(vocab_size=3, context_length=4, emb_dim=8, n_heads=1, n_layers=1, dtype="bfloat16")


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the record sees, set by hand."""
    now = [100.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    return now


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Task):
    """A task without data."""

    build = shapes = validation_batches = loss_fn = None


class ToyOfTexts(Toy):
    unit = "text"
    score = "accuracy"

    def figures(self, sums):
        return {"accuracy": 0.25}


@pytest.fixture
def make(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda dtype: 1e6)

    def make(last_kept=-1, loggers=(), cls=Toy, **fields):
        output = io.StringIO()
        progress = ProgressLine(Console(file=output, width=200), 100)
        task = cls(
            config=RunConfig(train=TrainConfig(log_every=1)),
            model_config=CFG,
            params=Parameters({"norm": {"bias": jnp.zeros(2), "scale": jnp.ones(2)}}, {}),
            train_batches=grain.MapDataset.range(1),
            total_steps=100,
            tokens_per_step=64,
            tokenizer=CharTokenizer("ab"),
            fingerprint="",
            **fields,
        )
        run = RunLog(task, RunFolder(tmp_path), progress, 2, last_kept, loggers)
        run.output = output
        return run

    return make


def step_metrics(loss, skipped=False):
    numbers, bad = map(jnp.float32, (loss, 64.0, 0.5, 1e-3)), jnp.array([False, skipped])
    return StepMetrics(*numbers, jnp.array(skipped), {"margin": jnp.float32(0.25)}, bad)


def sums(loss, n=10):
    return EvaluationSums(loss * n, n, {})


def test_a_step_is_logged_with_its_speed(make, clock):
    rows, texts = [], []
    run = make(loggers=[Logger(rows.append, lambda *text: texts.append(text), lambda: None)])
    run.start_lap(10)
    clock[0] += 4.0
    run.train(12, step_metrics(2.0))
    (row,) = run.folder.metrics("train")
    assert row == rows[0] | {"mfu": pytest.approx(rows[0]["mfu"])}
    run.sample(7, "some text")
    assert texts == [("sample", "some text", 7)]
    assert row == {
        "step": 12, "split": "train", "loss": 2.0, "perplexity": pytest.approx(math.e**2), "grad_norm": 0.5,
        "margin": 0.25, "learning_rate": pytest.approx(1e-3), "tokens": 12 * 64, "tokens_per_second": 32.0,
        "seconds": 4.0, "mfu": pytest.approx(32.0 * hardware.flops_per_token(CFG) / 2e6),  # of both devices
    }  # fmt: skip


def test_a_lap_begins_after_each_logged_step(make, clock):
    run = make()
    for step, seconds in ((1, 1.0), (2, 2.0)):
        clock[0] += seconds
        run.train(step, step_metrics(1.0))
    assert [row["tokens_per_second"] for row in run.folder.metrics("train")] == [64.0, 32.0]


def test_a_step_is_logged_when_the_next_one_is_under_way_and_three_bad_ones_stop_training(make):
    run = make()
    run.step(1, step_metrics(1.0))
    assert run.folder.metrics("train") == []
    for step in (2, 3, 4):
        run.step(step, step_metrics(math.nan, skipped=True))
    assert [row["step"] for row in run.folder.metrics("train")] == [1, 2, 3]
    with pytest.raises(TrainingDiverged, match=r"of norm/scale.*parameters are still those of step 1"):
        run.flush()
    assert "step 2: loss nan, gradient norm 0.5 (gradient of norm/scale): skipped" in run.output.getvalue()


def test_a_loss_far_above_the_last_ones_is_noted_once(make):
    run = make()
    for step in range(1, 30):
        run.train(step, step_metrics(9.0 if step in (3, 25) else 2.0 + step % 2))
    notes = [line for line in run.output.getvalue().splitlines() if "loss rose" in line]
    assert [line.partition(":")[0] for line in notes] == ["step 25"]


def test_a_picture_that_fails_is_a_warning_once(make, monkeypatch):
    monkeypatch.setattr(record, "write_png", lambda figure, path: 1 / 0)
    run = make()
    run.train(1, step_metrics(2.0))
    run.draw()
    run.draw()
    assert run.output.getvalue().count("warning: loss.png was not drawn") == 1


def test_a_skipped_step_says_so_and_has_no_loss(make, clock):
    run = make()
    clock[0] += 1.0
    run.train(1, step_metrics(math.nan, skipped=True))
    (row,) = run.folder.metrics("train")
    assert row["skipped"] is True
    assert row["loss"] is row["perplexity"] is None


def test_an_evaluation_is_the_best_only_when_its_loss_is_the_lowest(make):
    run = make(bytes_per_token=2.0)
    best = [run.evaluation(step, sums(loss)) for step, loss in enumerate((3.0, math.nan, 2.0, 2.0))]
    assert best == [True, False, True, False]
    assert run.validation == {0: 3.0, 1: math.inf, 2: 2.0, 3: 2.0}
    first = run.folder.metrics("val")[0]
    assert first["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 2.0)
    assert (first["tokens"], first["perplexity"]) == (10, pytest.approx(math.e**3))


def test_what_is_a_loss_a_text_has_a_score_and_no_perplexity(make, monkeypatch):
    run, notes = make(cls=ToyOfTexts), []
    monkeypatch.setattr(run.progress, "note", notes.append)
    run.evaluation(0, sums(1.0))
    assert notes == ["step 0: validation loss 1.0000, accuracy 25.00%"]
    (row,) = run.folder.metrics("val")
    assert "perplexity" not in row
    assert (row["accuracy"], row["texts"]) == (0.25, 10)


def test_a_run_goes_on_with_its_own_past(make, clock):
    run = make()
    for step in (1, 2, 3):
        clock[0] += 10.0
        run.train(step, step_metrics(1.0))
        run.evaluation(step, sums(4.0 - step))
        run.sample(step, "text")
    again = make(last_kept=2)
    assert again.validation == {1: 3.0, 2: 2.0}
    assert again.sampled == {1, 2}
    clock[0] += 5.0
    assert again.seconds() == 25.0
    assert [row["step"] for row in again.folder.metrics("train")] == [1, 2]


def test_the_test_split_is_logged_once(make):
    run = make()
    for _ in range(2):
        run.test(5, {"accuracy": 0.5})
    assert run.folder.metrics("test") == [{"step": 5, "split": "test", "accuracy": 0.5}]


@pytest.mark.parametrize(("training", "count"), [([3.0, 2.5, 2.0, 1.5, 1.0], 1), ([2.5, 2.5, 2.6, 2.7, 2.8], 0)])
def test_overfitting_is_said_once_and_only_while_the_training_loss_falls(make, clock, training, count):
    run = make()
    for step, (train, validation) in enumerate(zip(training, [3.0, 2.0, 2.1, 2.2, 2.3], strict=True), start=1):
        clock[0] += 1.0
        run.train(step, step_metrics(train))
        run.evaluation(step, sums(validation))
    run.evaluation(6, sums(2.4))
    assert run.output.getvalue().count("overfitting: the validation loss was lowest at step 2") == count


@pytest.mark.parametrize("key", ["loss", "seconds", "tokens", "tokens_per_second"])
def test_a_line_that_lost_a_key_stops_no_run(make, clock, key):
    run = make()
    clock[0] += 1.0
    run.train(1, step_metrics(2.0))
    run.evaluation(1, sums(2.0))
    run.folder.metrics_file.write_text(run.folder.metrics_file.read_text().replace(f'"{key}"', '"lost"'))
    again = make(last_kept=1)
    again.evaluation(2, sums(1.0))
    assert again.summary()["best_step"] == 2
