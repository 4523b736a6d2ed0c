"""What must hold of the time to a loss: whole runs are timed, each to the loss, and what is missing is one line."""

import json
import sys

import pytest
import yaml
from programs import run

# Prints a loss at each step, and runs for minutes unless it is stopped.
STAND_IN = """
import time, numpy as np
seed = (1337 + 0)
ids = np.fromfile("data/shakespeare_char/val.bin", np.uint16)
for step, loss in enumerate((4.2, 1.9, 1.5, 1.2)):
    print(f"step {step * 250}: train loss 1.0000, val loss {loss:.4f}")
    print(f"iter {step * 250}: loss 0.1, {len(ids)} characters of {ids.max() + 1} kinds")
time.sleep(300)
"""


@pytest.fixture
def recipe(text_file, tmp_path):
    config = {
        "data": {"source": f"text:{text_file}"},
        "tokenizer": {"kind": "char"},
        "model": {"n_layers": 1, "n_heads": 2, "emb_dim": 16, "context_length": 16},
        "optimizer": {"kind": "muon", "warmup_steps": 2},
        "train": {"steps": 3, "eval_every": 3},
        "checkpoint": {"every": 3},
        "sample": {"every": 0},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture
def nanogpt(tmp_path):
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    (folder / "train.py").write_text(STAND_IN)
    return folder


@pytest.mark.slow
def test_each_is_timed_to_the_loss(recipe, nanogpt, named_data, tmp_path):
    output = tmp_path / "speedrun.json"
    done = run("speedrun", "--recipe", recipe, "--seeds", 3, "--loss", 1.6, "--nanogpt", nanogpt, "--output", output)
    assert done.returncode == 1, done.stderr  # three steps are not enough for ours
    theirs, empty, warm = json.loads(output.read_text())["results"]
    assert [result["who"] for result in (theirs, empty, warm)] == [
        "nanoGPT",
        "slm_jax, empty cache",
        "slm_jax, warm cache",
    ]
    assert empty["loss"] == warm["loss"] > 1.6
    assert all(
        0 < each["seconds"] < 100 for each in (theirs, empty, warm)
    )  # of so short runs the load decides which is faster
    assert (empty["step"], empty["seed"]) == (3, 3)
    assert (theirs["step"], theirs["loss"]) == (500, 1.5)
    lines = done.stdout.splitlines()
    assert sum("of nanoGPT's" in line for line in lines) == 2
    assert lines[-2:] == [f"slm_jax, {cache} cache, seed 3: did not reach 1.6" for cache in ("empty", "warm")]


def test_nanogpt_that_fails_is_one_line_with_its_error_and_its_interpreter_is_found(
    recipe, nanogpt, named_data, tmp_path, monkeypatch
):
    (nanogpt / "train.py").write_text("raise RuntimeError('no torch here')")
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    done = run("speedrun", "--recipe", recipe, "--seeds", 0, "--nanogpt", nanogpt, "--interpreter", "./python")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("train.py ended with 1: RuntimeError: no torch here")
