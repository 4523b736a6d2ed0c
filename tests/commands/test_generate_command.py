"""What must hold of ``slm-jax generate``'s options; tests/test_cli.py runs it on a trained model."""

from pathlib import Path

from slm_jax import cli


def generate(run: Path, *more: str) -> list[str]:
    return ["generate", "--run", str(run), "--temperature", "0", "--max-new-tokens", "20", *more]


def test_only_the_answer_to_an_instruction_is_printed_up_to_what_ends_it(instructed, capsys):
    prompt = "User: the dog, sat\nAssistant: "
    assert cli.main(generate(instructed, "--prompt", prompt)) == 0
    assert capsys.readouterr().out == f"{prompt}cat.\n"
    asked = ["--instruction", "the dog", "--input", "sat"]
    assert cli.main(generate(instructed, *asked)) == 0
    shown = capsys.readouterr()
    assert shown.out == "cat\n"
    assert "alpaca" not in shown.err
    assert cli.main(generate(instructed, *asked, "--stop", "t")) == 0
    assert capsys.readouterr().out == "ca\n"


def test_an_answer_begins_without_the_space_of_its_first_token(instructed, capsys, monkeypatch):
    monkeypatch.setattr("slm_jax.generation.decode.stream_text", lambda *_, **__: iter([" ", " a", " cat"]))
    assert cli.main(generate(instructed, "--instruction", "the dog")) == 0
    assert capsys.readouterr().out == "a cat\n"
    assert cli.main(generate(instructed, "--prompt", "the")) == 0
    assert capsys.readouterr().out == "the  a cat\n"


def test_with_8_bit_weights_the_answer_stays(instructed, capsys):
    assert cli.main(generate(instructed, "--instruction", "the dog", "--input", "sat", "--weights", "int8")) == 0
    assert capsys.readouterr().out == "cat\n"


def test_a_model_without_a_template_is_shown_alpacas(weights, capsys):
    assert cli.main(generate(weights, "--instruction", "cat")) == 2
    said, refused = capsys.readouterr().err.splitlines()
    assert said.endswith("was not trained on instructions; using the template alpaca")
    assert "'B'" in refused  # the first letter of Alpaca's, which this model's tokenizer does not know
