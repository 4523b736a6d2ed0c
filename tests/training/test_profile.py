"""What must hold of a profile: the steps that were asked for, in a file that can be opened, and training unchanged."""

import gzip
import json

import jax
import pytest
from pretraining import metrics, options
from slm_jax.training.record import StepProfile

from slm_jax import cli
from slm_jax.errors import InputError
from slm_jax.training.config import parse_profile


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:5", "6:5", "a:b", "-1:4", "1:2:3"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(InputError, match="expected FROM:TO, such as 100:105"):
        parse_profile(text)


def test_a_range_of_steps():
    assert parse_profile("100:105") == (100, 105)


@pytest.fixture
def traced(monkeypatch):
    """What happens to JAX's profiler, instead of it."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def follow(profile, steps, calls):
    for step in steps:
        profile.at(step, lambda step=step: calls.append(f"wait for {step}"))


def test_it_begins_and_ends_when_the_devices_have_done_the_steps(traced, tmp_path):
    profile = StepProfile("2:4", tmp_path, lambda text: None)
    follow(profile, range(9), traced)
    profile.end()
    assert traced == ["wait for 2", "start", "wait for 4", "stop"]


def test_a_run_that_ends_before_writes_what_there_is(traced, tmp_path):
    profile = StepProfile("2:9", tmp_path, lambda text: None)
    follow(profile, range(4), traced)
    profile.end()
    profile.end()
    assert traced == ["wait for 2", "start", "stop"]


def test_that_there_is_none_is_said(traced, tmp_path):
    notes = []
    profile = StepProfile("20:40", tmp_path, notes.append)
    follow(profile, range(9), traced)
    profile.end()
    assert traced == []
    assert notes == ["no profile: this start did not reach step 20 of train.profile"]
    StepProfile(None, tmp_path, notes.append).end()
    assert len(notes) == 1


def test_a_run_that_goes_on_behind_it_has_none(traced, tmp_path):
    profile = StepProfile("2:4", tmp_path, lambda text: None)
    follow(profile, range(4, 9), traced)
    profile.end()
    assert traced == []


def test_a_run_that_goes_on_in_the_middle_has_the_rest(traced, tmp_path):
    profile = StepProfile("2:5", tmp_path, lambda text: None)
    follow(profile, range(3, 9), traced)
    assert traced == ["wait for 3", "start", "wait for 5", "stop"]


@pytest.mark.slow
def test_a_profile_can_be_opened_and_changes_nothing(text_file, tmp_path, capsys):
    small = {"train.steps": 4, "train.accumulate": 1, "sample.every": 0, "checkpoint.every": 9}
    assert cli.main(["train", *options(text_file, tmp_path / "a", **small)]) == 0
    assert cli.main(["train", *options(text_file, tmp_path / "b", **small, train__profile="2:3")]) == 0
    assert "profile written to" in capsys.readouterr().out
    assert metrics(tmp_path / "a/small") == metrics(tmp_path / "b/small")
    (file,) = (tmp_path / "b/small/profile").rglob("perfetto_trace.json.gz")
    names = {event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert any("train_step" in name for name in names), sorted(names)[:50]
