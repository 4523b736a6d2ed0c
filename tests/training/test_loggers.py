"""What must hold of other loggers: the figures of metrics.jsonl under the same names, each once, none lost."""

import importlib.util
import json
import struct
import time

import pytest
from pretraining import options
from refusals import fails

from slm_jax import cli
from slm_jax.errors import InputError
from slm_jax.tasks.config import RunConfig
from slm_jax.training.config import LoggingConfig
from slm_jax.training.loggers import WANDB_ID, check_loggers, figures, open_loggers


def events(folder):
    """Read TensorBoard's files as TensorBoard does: (step, name) -> value, without what was purged."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    scalars, texts = {}, {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                scalars = {key: value for key, value in scalars.items() if key[0] < event.step}
                texts = {key: value for key, value in texts.items() if key[0] < event.step}
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "text":
                    texts[event.step, value.tag] = value.tensor.string_val[0].decode()
                else:
                    scalars[event.step, value.tag] = value.simple_value
    return scalars, texts


def logged(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): value for row in rows for name, value in figures(row).items()}


def test_figures_are_the_finite_numbers_of_a_row():
    row = {"step": 3, "split": "train", "loss": 2.5, "tokens": 7, "mfu": None, "skipped": True, "perplexity": 1e400}
    assert figures(row) == {"train/loss": 2.5, "train/tokens": 7.0, "train/skipped": 1.0}


@pytest.mark.slow
def test_a_run_that_goes_on_has_each_step_once_in_tensorboard(text_file, tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    more = {"checkpoint.every": 2, "sample.every": 2, "sample.max_new_tokens": 1, "train.accumulate": 1}
    args = options(text_file, tmp_path, optimizer__schedule="constant", logging__tensorboard="true", **more)
    assert cli.main(["train", *args, "--train.steps", "3"]) == 0
    # The last checkpoint is lost, so that the run resumes from step 2 and repeats a step.
    for path in (tmp_path / "small/checkpoints/3").rglob("*.json"):
        path.write_text("damaged")
    assert cli.main(["train", *args, "--train.steps", "4"]) == 0
    assert "tensorboard" in capsys.readouterr().out
    scalars, texts = events(tmp_path / "small/tensorboard")
    expected = logged(tmp_path / "small")
    assert scalars.keys() == expected.keys()
    assert {step for step, _ in scalars} == set(range(5))
    assert all(scalars[key] == pytest.approx(value, rel=1e-6) for key, value in expected.items())
    assert texts
    assert all(line.startswith("    ") for text in texts.values() for line in text.splitlines())  # as code


def test_wandb_offline_has_what_the_log_has_and_a_run_that_goes_on_is_the_same(tmp_path):
    pytest.importorskip("wandb")
    config = RunConfig(run="named", logging=LoggingConfig(wandb="offline", wandb_project="project-of-tests"))
    losses = (b"3.2517", b"2.7319")
    for step, loss in enumerate(map(float, losses)):
        logger = open_loggers(config, tmp_path, -1)[0]
        logger.metrics({"step": step, "split": "val", "loss": loss})
        logger.text("sample", "<b>bold</b>", step)
        logger.close()
    name = (tmp_path / WANDB_ID).read_text().strip()
    pattern = f"offline-run-*-{name}*/*.wandb"  # a second one in the same second has a number behind
    until = time.monotonic() + 30

    def written():
        return [path.read_bytes() for path in (tmp_path / "wandb").glob(pattern)]

    while not all(loss in b"".join(written()) for loss in losses):
        assert time.monotonic() < until, "wandb, which writes in a process of its own, wrote no such losses"
        time.sleep(0.1)
    assert len(written()) == 2
    for content in written():
        assert sum(loss in content for loss in losses) == 1
        assert all(text in content for text in (b"val/loss", b"project-of-tests", b"named", name.encode()))
    html = next((tmp_path / "wandb").rglob("*.html")).read_text()
    assert "&lt;b&gt;bold" in html


def test_what_is_not_installed_is_refused_before_anything_is_written(text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for key, value, package in (("tensorboard", "true", "tensorboardX"), ("wandb", "offline", "wandb")):
        words = ["train", *options(text_file, tmp_path), f"--logging.{key}", value]
        fails(words, capsys, f"logging.{key} needs the package {package}", f".[{key}]")
    assert not list(tmp_path.iterdir())
    check_loggers(LoggingConfig())


def test_wandb_without_a_login_is_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    config = RunConfig(logging=LoggingConfig(wandb="online"))
    with pytest.raises(InputError, match=r"api_key not configured \(no-tty\); run wandb login"):
        open_loggers(config, tmp_path, -1)
