"""What must hold of ``slm-jax classify``: a line for each text, from wherever the texts come."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import fails

import slm_jax
from slm_jax import cli
from slm_jax.commands.classify import Options
from slm_jax.config import parse
from slm_jax.errors import InputError
from slm_jax.runs import read_checkpoint
from slm_jax.tokenizer import tokenizer_from_dict

CATS, DOGS = "the cat sat on the mat", "the dog sat on the log"


def classify(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[list[str], list[str]]:
    """Run the command; return the lines that it printed and those on stderr."""
    assert cli.main(["classify", *args]) == 0
    shown = capsys.readouterr()
    return shown.out.splitlines(), shown.err.splitlines()


def test_texts_are_words_that_belong_to_no_option(classifier, capsys):
    expected = [
        f"{prediction.label}\t{prediction.probability:.4f}\t{text}"
        for text, prediction in zip((CATS, DOGS), slm_jax.load_classifier(classifier)([CATS, DOGS]), strict=True)
    ]
    assert [line.partition("\t")[0] for line in expected] == ["cat", "dog"]
    run = str(classifier)
    for args in ((CATS, f"--run={run}", "--", DOGS), ("--run", run, "--text", CATS, "--text", DOGS)):
        assert classify(capsys, *args) == (expected, [])


def test_a_text_is_taken_as_it_was_typed(classifier, capsys):
    texts = ["the cat: {the}", "[cat, dog]", "# the", "null", "", "the\ncat\t sat", "é 🐈", "-1", "--run", "--"]
    options = parse(Options, ["--run", "x", "--", *texts], "slm-jax classify")
    assert options.text == tuple(texts)
    (line,), _ = classify(capsys, "--run", str(classifier), "the\ncat sat")
    assert line.endswith("\tthe cat sat")  # a line for a text


def test_json_has_all_probabilities(classifier, capsys):
    lines, said = classify(capsys, "--run", str(classifier), "--format", "json", "the cat", DOGS + ", and the cat")
    assert said == ["warning: 1 of 2 texts are longer than 24 tokens and were truncated on the right"]
    rows = [json.loads(line) for line in lines]
    assert [set(row) for row in rows] == [{"text", "label", "probability", "probabilities", "truncated"}] * 2
    assert [row["truncated"] for row in rows] == [False, True]
    for row in rows:
        assert row["probabilities"][row["label"]] == row["probability"]
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-6)


def test_with_8_bit_weights_the_probabilities_stay_close(classifier, capsys):
    rows = []
    for more in ([], ["--weights", "int8"]):
        (line,), _ = classify(capsys, "--run", str(classifier), "--format", "json", *more, CATS)
        rows.append(json.loads(line)["probabilities"]["cat"])
    assert rows[1] == pytest.approx(rows[0], abs=0.02)
    assert rows[1] != rows[0]


def test_lines_of_a_file_or_of_the_standard_input(classifier, tmp_path, capsys, monkeypatch):
    run = ["--run", str(classifier)]
    expected, _ = classify(capsys, *run, CATS, DOGS)
    file = tmp_path / "texts.txt"
    file.write_bytes(f"\ufeff{CATS}\r\n \n\n{DOGS}".encode())
    assert classify(capsys, *run, "--file", str(file)) == (expected, [f"{file}: skipped 2 blank of 4 lines"])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{CATS}\n\n{DOGS}\n"))
    assert classify(capsys, *run) == (expected, ["standard input: skipped 1 blank of 3 lines"])


def test_without_a_text_it_says_how_to_give_one(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    fails(["classify", "--run", "x"], capsys, "slm-jax classify: no text; expected texts, such as")
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    fails(["classify", "--run", "x"], capsys, "slm-jax classify: standard input: no text")


def test_a_text_that_cannot_be_read_is_named(classifier, monkeypatch, capsys):
    run = ["classify", "--run", str(classifier)]
    fails([*run, "the cat", "the Cat"], capsys, "text 'the Cat': the tokenizer cannot encode 'C'")
    stdin = io.TextIOWrapper(io.BytesIO(b"the cat\nhi \xff\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", stdin)
    fails(run, capsys, "lone surrogate")


def test_a_classifier_writes_no_text_and_a_model_of_text_tells_no_class(classifier, instructed, tmp_path, capsys):
    run, out = str(classifier), tmp_path / "out"
    for args in (
        ["generate", "--run", run],
        ["chat", "--run", run],
        ["evaluate", "--run", run, "--source", "builtin:python-docs"],
    ):
        fails(args, capsys, "is a classifier; expected a language model")
    fails(["export", "--run", run, "--out", str(out)], capsys, "pooling is mean")
    assert not out.exists()
    fails(["classify", "--run", instructed, "a"], capsys, "is no classifier; expected a run of slm-jax finetune")


def test_a_loaded_classifier_is_the_checkpoints_model(classifier, tmp_path):
    step = max(int(path.name) for path in (classifier / "checkpoints").iterdir() if path.name.isdecimal())
    cfg, params, metadata = read_checkpoint(classifier, step, "float32", classifier=True)
    model = slm_jax.GPTClassifier(cfg, n_classes=2, pooling=metadata["pooling"])
    ids = jnp.array([tokenizer_from_dict(metadata["tokenizer"]).encode("the cat")], jnp.int32)
    expected = jax.nn.softmax(model.apply({"params": params}, ids, jnp.array([7])))[0]
    for loaded in (slm_jax.load_classifier(f"{classifier}@latest"), slm_jax.load_classifier(classifier, step=step)):
        np.testing.assert_allclose(list(loaded(["the cat"])[0].probabilities.values()), expected, atol=1e-6)


def test_runs_without_a_classifier_are_refused(classifier, tmp_path):
    copy = shutil.copytree(classifier, tmp_path / "copy")
    content = (copy / "frozen.safetensors").read_bytes()
    (copy / "frozen.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for source, problem in (
        (tmp_path / "none", "no run with checkpoints there"),
        (f"{classifier}@7", "no checkpoint of step 7"),
        (copy, "damaged"),
    ):
        with pytest.raises(InputError, match=problem):
            slm_jax.load_classifier(source)
