"""What must hold of ``slm-jax evaluate``: valid JSON with the figures that the functions give."""

import json
import math
from pathlib import Path

import pytest

from slm_jax import cli
from slm_jax.evaluation import evaluate_source, hellaswag, lambada, to_dict
from slm_jax.model import GPTModel
from slm_jax.run import load_model

TEXT = "the cat sat on the mat, and the dog sat on the log. " * 9


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "cats.txt").write_text(TEXT)
    (folder / "lambada.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "the dog sat on the log"}\n')
    row = {"activity_label": "sat", "ctx_a": "the cat", "ctx_b": "", "endings": ["sat.", "log.", "mat."], "label": 1}
    (folder / "hellaswag.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_it_prints_what_the_functions_measure(weights, files, capsys):
    sources = {name: f"jsonl:{files / name}.jsonl" for name in ("lambada", "hellaswag")}
    text = {"source": f"text:{files / 'cats.txt'}", "split": "validation", "stride": 16, "context_length": 32}
    options = {"run": weights, **text, **sources}
    args = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main(["evaluate", *args]) == 0
    figures = json.loads(capsys.readouterr().out)
    run = load_model(weights)
    model = (GPTModel(run.model_config), run.params, run.tokenizer)
    assert figures["text"] == to_dict(evaluate_source(*model, **text))
    assert figures["lambada"] == to_dict(lambada(*model, sources["lambada"]))
    assert figures["hellaswag"] == to_dict(hellaswag(*model, sources["hellaswag"]))
    assert figures["run"] == str(weights)
    assert math.isclose(math.exp(figures["text"]["loss"]), figures["text"]["perplexity"])


def test_it_writes_to_a_file_or_says_why_not(weights, files, tmp_path, capsys):
    args = ["evaluate", "--run", str(weights), "--source", f"text:{files / 'cats.txt'}"]
    assert cli.main([*args, "--out", str(tmp_path / "new" / "figures.json")]) == 0
    assert json.loads((tmp_path / "new" / "figures.json").read_text())["text"]["n_bytes"] == len(TEXT)
    assert capsys.readouterr().out == ""
    (tmp_path / "file").write_text("")
    assert cli.main([*args, "--out", str(tmp_path / "file" / "figures.json")]) == 2
    assert "choose another place with --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "nothing to measure; expected --source, --lambada or --hellaswag"),
        (["--source", "text:x", "--validation-fraction", "1"], "validation_fraction is 1.0; expected a number between"),
        (["--source", "text:x", "--stride", "0"], "stride is 0; expected at least 1"),
        (["--source", "text:x", "--split", "test"], "split is 'test'; expected one of all, train, validation"),
        (["--lambada", "lambada.jsonl"], "lambada.jsonl"),
        (["--source", "named:the-verdict", "--lambada", "jsonl:none.jsonl"], "none.jsonl: no such file"),
        (["--source", "text:x", "--out", ""], "out is ''; expected a file"),
        (["--source", "text:x", "--out", "."], "out is '.'; expected a file"),
        (["--source", "text:x", "--out", f"{__file__}/x.json"], "choose another place with --out"),
        (["--source", "text:x", "--out", "~nouser/x"], "cannot be used as a path"),
        (["--source", "text:none.txt"], "none.txt: no such file"),
    ],
)
def test_mistakes_are_one_line(weights, capsys, args, said):
    assert cli.main(["evaluate", "--run", str(weights), *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("slm-jax evaluate: ")
    assert said in line
