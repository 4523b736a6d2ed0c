"""What must hold of ``slm-jax chat``: it answers every line, and a mistake does not end it."""

import io
from pathlib import Path

import pytest

from slm_jax import cli
from slm_jax.commands.chat import Options
from slm_jax.data.templates import TEMPLATES, TextTemplate

TAUGHT = TextTemplate(user_start="<", assistant_start=">")


def chat(weights: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    stdin = io.TextIOWrapper(io.BytesIO(lines.encode(errors="surrogateescape")), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", stdin)
    return cli.main(["chat", "--run", str(weights), "--max-new-tokens", "8", *more])


def test_it_answers_each_line_and_survives_mistakes(weights, capsys, monkeypatch):
    lines = "the cat\n\n/nonsense\nmüller\nhi \udcff\n/temperature\n/temperature hot\n/temperature -1\nthe dog\n"
    assert chat(weights, lines, monkeypatch) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) >= 3
    assert "The temperature is 0.8." in shown.out
    for problem in ("/nonsense is no command", "'ü'", "surrogate", "temperature is 'hot'", "temperature is -1.0"):
        assert problem in shown.err
    assert chat(weights, "/quit\nthe cat\n", monkeypatch) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.hostile
def test_a_terminal_gets_no_control_characters_from_a_model(weights, capsys, monkeypatch):
    pieces = ["a\x1b]0;b\x07\x9b2J", "c\td"]
    monkeypatch.setattr("slm_jax.generation.conversation.Conversation.answer", lambda *_: (each for each in pieces))
    assert chat(weights, "the cat\n", monkeypatch) == 0
    assert capsys.readouterr().out == "a\x1b]0;b\x07\x9b2Jc\td\n"  # a file has what the model wrote
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert chat(weights, "the cat\n", monkeypatch) == 0
    assert capsys.readouterr().out == r"a\x1b]0;b\x07\x9b2Jc" + "\td\n"
    assert chat(weights, "the cat\n", monkeypatch, "--template", "\x1b[2J") == 2
    assert "\x1b" not in capsys.readouterr().err


def test_reset_and_temperature_change_the_conversation(weights, capsys, monkeypatch):
    assert chat(weights, "/help\nthe cat\n/temperature 0\n/reset\nsat\n", monkeypatch) == 0
    changed = capsys.readouterr().out.splitlines()
    assert all(name in "".join(changed[:4]) for name in ("/help", "/reset", "/temperature", "/quit"))
    assert "The temperature is 0." in changed
    assert chat(weights, "sat\n", monkeypatch, "--temperature", "0") == 0
    assert capsys.readouterr().out.splitlines() == changed[changed.index("The conversation is forgotten.") + 1 :]


def test_the_template_is_the_runs_or_the_one_that_is_named(tmp_path):
    plain = Options(run="x", you="dog", model="cat").choose_template(None)
    assert (plain.user_start, plain.assistant_start, plain.stop) == ("\ndog: ", "\ncat:", ("\ndog:",))
    assert Options(run="x").choose_template(TAUGHT) == TAUGHT
    assert Options(run="x", template="none", you="dog").choose_template(TAUGHT).user_start == "\ndog: "
    assert Options(run="x", template="alpaca").choose_template(TAUGHT) == TEMPLATES["alpaca"]
    file = tmp_path / "mine.json"
    file.write_text('{"user_start": "User ", "assistant_start": " A ", "assistant_end": "."}')
    assert Options(run="x", template=str(file)).choose_template(None).assistant_start == " A "
