"""What must hold of a profile: the steps that were asked for, in a file that can be opened, and training unchanged."""

import gzip
import json

import jax
import pytest
from pretraining import metrics, options

from slm_jax import cli
from slm_jax.errors import InputError
from slm_jax.tasks.config import RunConfig
from slm_jax.training.config import TrainConfig
from slm_jax.training.record import StepProfile


@pytest.fixture
def traced(monkeypatch):
    """What happens to JAX's profiler, instead of it."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("wanted", "steps", "expected"),
    [
        ("2:4", range(9), ["wait for 2", "start", "wait for 4", "stop"]),
        ("2:9", range(4), ["wait for 2", "start", "stop"]),  # the run ends before
        ("2:4", range(4, 9), ["no profile: this start did not reach step 2 of train.profile"]),
        ("2:5", range(3, 9), ["wait for 3", "start", "wait for 5", "stop"]),  # resumed in the middle
        ("20:40", range(9), ["no profile: this start did not reach step 20 of train.profile"]),
        (None, range(9), []),
    ],
)
def test_the_steps_are_profiled_once_the_devices_have_done_those_before(traced, tmp_path, wanted, steps, expected):
    steps_wanted = TrainConfig(profile=wanted).profile_steps
    profile = StepProfile(steps_wanted, tmp_path, lambda text: traced.append(text) if "no profile" in text else None)
    for step in steps:
        profile.at(step, lambda step=step: traced.append(f"wait for {step}"))
    profile.close()
    assert traced == expected


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:5", "6:5", "a:b", "-1:4", "1:2:3"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(InputError, match="expected FROM:TO, such as 100:105"):
        RunConfig(train=TrainConfig(profile=text))


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
