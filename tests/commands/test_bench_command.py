"""What must hold of ``slm-jax bench``: figures to read and to compute with, one line for a mistake."""

import json

import pytest

from slm_jax import cli

SMALL = [
    *("--model.vocab_size", "64", "--model.context_length", "16", "--model.n_layers", "1", "--model.emb_dim", "32"),
    *("--model.n_heads", "2"),
]


def test_train_prints_writes_and_draws(tmp_path, capsys):
    files = ["--out", str(tmp_path / "train.json"), "--plot", str(tmp_path / "train.png")]
    words = [*SMALL, "--tokenizer.kind", "char", "--train.batch_size", "4", "--repeats", "2", "--device", "h200"]
    assert cli.main(["bench", "train", *words, *files]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("compilation", "tokens", "MFU", "6 N + 12", "peak memory", "data sheet of h200", "loss"):
        assert part in printed
    content = json.loads((tmp_path / "train.json").read_text())
    assert content["what"] == "train"
    assert content["config"]["train"]["batch_size"] == 4
    assert content["figures"]["loss_finite"] is True
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_generate_prints_json(monkeypatch, capsys):
    monkeypatch.setattr("slm_jax.bench.ceilings._SECONDS", 0.01)
    words = [*SMALL, "--prompt-tokens", "4", "--new_tokens", "5", "--batch_sizes", "2", "--repeats", "1"]
    assert cli.main(["bench", "generate", *words, "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (case,) = content["figures"]["cases"]
    assert case["batch_size"] == 2
    assert case["decode_step_seconds"]["repeats"]
    assert content["config"]["emb_dim"] == 32
    assert content["figures"]["ceilings"]["bandwidth"] > 0


def test_generate_measures_a_run(weights, monkeypatch, capsys):
    monkeypatch.setattr("slm_jax.bench.ceilings._SECONDS", 0.01)
    words = ["--run", str(weights), "--prompt_tokens", "3", "--new_tokens", "2", "--batch_sizes", "1", "--repeats", "1"]
    assert cli.main(["bench", "generate", *words]) == 0
    assert "batch 1: each token after" in capsys.readouterr().out


def test_help_lists_the_kinds(capsys):
    assert cli.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {kind} " in printed for kind in ("train", "generate", "data", "startup", "memory"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "bench: nothing to measure; expected one of train, generate, data, startup, memory"),
        (["speed"], "bench: 'speed' is nothing to measure; expected one of train, generate, data, startup, memory"),
        (["train", "--repeats", "0"], "repeats is 0; expected at least 1"),
        (["train", "--peak", "many"], "peak is 'many'; expected a number"),
        (["train", "--peak", "-1"], "peak is -1.0; expected FLOP/s of one device"),
        (["train", "--device", "h20"], "device is 'h20'; did you mean h200"),
        (["train", "--task", "instruction"], "task is instruction; expected pretraining"),
        (["train", "--plot", "a.jpg"], "plot is 'a.jpg'; expected a file whose name ends in .png"),
        (["train", "--train.stepz", "3"], "unknown key train.stepz; did you mean train.steps?"),
        (["train", "--out", "no/such/folder.json"], "out is 'no/such/folder.json'; expected a file in a folder"),
        (["data", "--step-ms", "0"], "step_ms is 0.0; expected a number above 0"),
        (["generate", "--batch_sizes", "1,no"], "batch_sizes is '1,no'; expected whole numbers of at least 1"),
        (["generate", "--run", "x", "--model.preset", "mini"], "run is x and there are keys of model"),
        (["generate", "--run", "runs/none"], "runs/none"),
        (["data", "--data.source", "text:nowhere/*.txt"], "nowhere"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
