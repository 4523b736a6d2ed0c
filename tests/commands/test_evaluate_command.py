"""What must hold of ``slm-jax evaluate``: valid JSON with the figures that the functions give."""

import json
import math
from pathlib import Path

import pytest
from refusals import fails

from slm_jax import cli
from slm_jax.evaluation.benchmarks import hellaswag, lambada
from slm_jax.evaluation.logprobs import Scorer, evaluate_source
from slm_jax.evaluation.responses import read_responses, reference_loss
from slm_jax.model import GPTModel
from slm_jax.runs import load_model

TEXT = "the cat sat on the mat, and the dog sat on the log. " * 9


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "cats.txt").write_text(TEXT)
    (folder / "lambada.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "the dog sat on the log"}\n')
    row = {"activity_label": "sat", "ctx_a": "the cat", "ctx_b": "", "endings": ["sat.", "log.", "mat."], "label": 1}
    (folder / "hellaswag.jsonl").write_text(json.dumps(row) + "\n")
    entries = [("the cat", "the cat"), ("on the mat", "the log"), ("log", "dog"), ("the dog sat on", "the dog")]
    responses = [{"instruction": "sat", "output": output, "model_response": answer} for output, answer in entries]
    (folder / "responses.json").write_text(json.dumps(responses))
    return folder


def test_it_prints_what_the_functions_measure(weights, files, capsys):
    sources = {name: f"jsonl:{files / name}.jsonl" for name in ("lambada", "hellaswag")}
    text = {"source": f"text:{files / 'cats.txt'}", "split": "validation", "stride": 16, "context_length": 32}
    options = {"run": weights, **text, **sources}
    args = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main(["evaluate", *args]) == 0
    figures = json.loads(capsys.readouterr().out)
    run = load_model(weights)
    scorer = Scorer(GPTModel(run.model_config), run.params, run.tokenizer)
    assert figures["text"] == evaluate_source(scorer, **text)
    assert figures["lambada"] == lambada(scorer, sources["lambada"])
    assert figures["hellaswag"] == hellaswag(scorer, sources["hellaswag"])
    assert figures["run"] == str(weights)
    assert math.isclose(math.exp(figures["text"]["loss"]), figures["text"]["perplexity"])


def test_8_bit_weights_are_measured_as_they_are(weights, files, capsys):
    figures = []
    for more in ([], ["--weights", "int8"]):
        assert cli.main(["evaluate", "--run", str(weights), "--source", f"text:{files / 'cats.txt'}", *more]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    exact, small = figures
    assert "weights" not in exact
    assert small["weights"] == "int8"
    assert 0 < abs(small["text"]["loss"] / exact["text"]["loss"] - 1) < 0.01


def test_the_column_of_the_texts_may_have_another_name(weights, files, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": TEXT, "id": 1}))
    figures = []
    for source in (
        ["--source", f"jsonl:{tmp_path}/a.jsonl", "--text-column", "body"],
        ["--source", f"text:{files}/cats.txt"],
    ):
        assert cli.main(["evaluate", "--run", str(weights), *source]) == 0
        figures.append(json.loads(capsys.readouterr().out)["text"])
    assert figures[0] == {**figures[1], "source": figures[0]["source"]}


def test_responses_are_scored_without_a_model(files, capsys):
    assert cli.main(["evaluate", "--responses", str(files / "responses.json")]) == 0
    (name, scores), *rest = json.loads(capsys.readouterr().out).items()
    assert (name, rest) == ("responses", [])
    assert scores["source"] == str(files / "responses.json")
    assert (scores["n"], scores["exact_match"]) == (4, 0.25)
    assert math.isclose(scores["rouge_l"], (1 + 0.4 + 0 + 4 / 6) / 4)


def test_a_model_measures_the_references_with_its_template(instructed, files, capsys):
    args = ["evaluate", "--run", str(instructed), "--responses", str(files / "responses.json"), "--batch-size", "3"]
    assert cli.main(args) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    run = load_model(instructed)
    entries = read_responses(files / "responses.json")
    scorer = Scorer(GPTModel(run.model_config), run.params, run.tokenizer, 3)
    expected = reference_loss(scorer, run.template, entries)
    assert figures["references"] == expected
    assert figures["responses"]["n"] == 4
    assert captured.err == ""


def test_it_writes_to_a_file_or_says_why_not(weights, files, tmp_path, capsys):
    args = ["evaluate", "--run", str(weights), "--source", f"text:{files / 'cats.txt'}"]
    assert cli.main([*args, "--out", str(tmp_path / "new" / "figures.json")]) == 0
    assert json.loads((tmp_path / "new" / "figures.json").read_text())["text"]["n_bytes"] == len(TEXT)
    assert capsys.readouterr().out == ""
    (tmp_path / "file").write_text("")
    fails([*args, "--out", tmp_path / "file" / "figures.json"], capsys, "is not a writable folder")


def test_figures_beyond_a_float_are_null_in_json(weights, files, monkeypatch, capsys):
    monkeypatch.setattr("slm_jax.evaluation.logprobs.evaluate_source", lambda *_, **__: {"loss": math.nan, "n": 2})
    assert cli.main(["evaluate", "--run", str(weights), "--source", f"text:{files / 'cats.txt'}"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == {"loss": None, "n": 2}
