"""What must hold of ``slm-jax chat``: it answers, remembers, forgets, and never ends on a mistake."""

import dataclasses
import io
from pathlib import Path

import pytest

from slm_jax import cli
from slm_jax.commands.chat import Chat, Options
from slm_jax.data.templates import TEMPLATES, Message, Template
from slm_jax.errors import InputError
from slm_jax.runs import load_model


@pytest.fixture(scope="module")
def model(weights: Path):
    return load_model(weights)


def chat(loaded, **more) -> Chat:
    return Chat(loaded, Options(run="x", **{"max_new_tokens": 8, **more}))


def say(chat: Chat, message: str) -> str:
    return "".join(chat.answer(message))


def test_an_answer_continues_the_conversation_and_is_remembered(model):
    talk = chat(model)
    prompts = []
    encode = model.tokenizer.encode
    first = say(talk, "the cat")
    assert first == first.lstrip()
    assert [(said, answer.strip()) for said, answer in talk.turns] == [("the cat", first.strip())]
    prompts.append(talk._prompt("the dog"))
    (turn,) = talk.turns  # as the model wrote it, with the space before it
    assert prompts[0] == f"\nUser: the cat\nAssistant:{turn[1]}\nUser: the dog\nAssistant:"
    second = say(talk, "the dog")
    assert [message for message, _ in talk.turns] == ["the cat", "the dog"]
    # What it says depends on what was said before.
    alone = chat(model)
    alone._n_answers = 1
    assert second != say(alone, "the dog")
    assert len(encode(second)) <= 8


def test_an_answer_ends_before_the_next_message(model):
    talk = chat(model, max_new_tokens=60)
    answers = [say(talk, "sat") for _ in range(4)]
    assert not any("\nUser:" in answer for answer in answers)


def test_the_same_seed_gives_the_same_conversation(model):
    assert say(chat(model), "the cat") == say(chat(model), "the cat")
    assert say(chat(model), "the cat") != say(chat(model, seed=1), "the cat")
    talk = chat(model)
    assert say(talk, "the cat") != say(talk, "the cat")


def test_the_oldest_turns_go_when_there_is_no_room(model):
    talk = chat(model, introduction="the log.")
    for _ in range(8):
        say(talk, "sat on the mat")
    assert 1 <= len(talk.turns) < 8
    prompt = talk._prompt("the cat")
    assert prompt.startswith("the log.\nUser: ")
    assert len(model.tokenizer.encode(prompt)) + 8 <= 128
    with pytest.raises(
        InputError, match=r"the message, .*, makes \d+ tokens, and the model's context of 128 has room for 120"
    ):
        talk.answer("the cat " * 20)
    assert len(talk.turns) >= 1  # nothing is forgotten for a message that is refused


@pytest.fixture(scope="module")
def taught(model):
    """A run that was shown instructions, in a template of few characters, all in its vocabulary."""
    template = Template(
        user_start="\nUser:",
        assistant_start=" the",
        assistant_end=" and.",
        system_start="sat",
        system_end=",",
        input_start="",
    )
    return dataclasses.replace(model, template=template)


def test_a_run_with_a_template_is_spoken_to_in_it(taught):
    talk = chat(taught, introduction=" on the log")
    first = say(talk, " cat")
    assert not first.startswith(" ")
    ((_, answer),) = talk.turns
    assert talk._prompt(" dog") == taught.template.prompt(
        [
            Message("system", " on the log"),
            Message("user", " cat"),
            Message("assistant", answer),
            Message("user", " dog"),
        ]
    )
    assert chat(taught)._prompt(" dog") == "\nUser: dog the"  # without a system message
    assert chat(taught, template="none")._prompt("dog") == "\nUser: dog\nAssistant:"
    named = chat(taught, template="none", you="dog", model="cat")
    assert named._prompt("dog") == "\ndog: dog\ncat:"
    assert named._template.stop == ("\ndog:",)


def test_the_template_ends_an_answer(taught):
    """A stop that comes soon: a likely character of this model."""
    plain = say(chat(taught, max_new_tokens=60), " cat")
    end = plain[3]
    soon = dataclasses.replace(taught, template=dataclasses.replace(taught.template, assistant_end=end))
    assert say(chat(soon, max_new_tokens=60), " cat").rstrip() == plain.partition(end)[0].rstrip()


def test_the_oldest_turns_go_in_a_template_too_and_its_introduction_stays(taught):
    talk = chat(taught, introduction=" on the log")
    for _ in range(8):
        say(talk, " sat on the mat")
    assert 1 <= len(talk.turns) < 8
    prompt = talk._prompt(" the cat")
    assert prompt.startswith("sat on the log,\nUser: sat on the mat the")
    assert prompt.endswith("\nUser: the cat the")
    assert len(taught.tokenizer.encode(prompt)) + 8 <= 128


def test_a_template_can_be_named_or_read_from_a_file(model, tmp_path):
    assert chat(model, template="alpaca")._template == TEMPLATES["alpaca"]
    file = tmp_path / "mine.json"
    file.write_text('{"user_start": "User ", "assistant_start": " A ", "assistant_end": "."}')
    assert chat(model, template=str(file))._prompt("the dog") == "User the dog A "
    with pytest.raises(InputError, match="no such file or built-in template"):
        chat(model, template="nonsense")


def test_names_are_refused_where_a_template_has_none(taught, capsys):
    for more in ({"you": "Me"}, {"model": "It"}):
        with pytest.raises(InputError, match=r"you and model are names in plain text, .* --template none"):
            chat(taught, **more)
    assert cli.main(["chat", "--run", "none", "--template", "phi3", "--you", "Me"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "leave them out or pass --template none" in line


def test_commands(model):
    talk = chat(model)
    say(talk, "the cat")
    for name in ("/help", "/reset", "/temperature", "/quit"):
        assert name in talk.command("/help")
    assert talk.command("/temperature") == "The temperature is 0.8."
    assert talk.command("/temperature 0") == "The temperature is 0."
    greedy = say(talk, "the dog")
    talk.command("/reset")
    assert talk.turns == []
    say(talk, "the cat")
    talk.command("/reset")
    assert say(talk, "sat") == say(chat(model, temperature=0.0), "sat")  # greedy, and nothing remembered
    assert greedy
    for line, said in (
        ("/temperature hot", "temperature is 'hot'; expected a number"),
        ("/temperature -1", "temperature is -1.0; expected 0"),
        ("/foo", "/foo is no command; expected /help"),
    ):
        with pytest.raises(InputError, match=said):
            talk.command(line)
    assert talk.command("/temperature") == "The temperature is 0."


def test_the_command_answers_each_line_and_survives_mistakes(weights, capsys, monkeypatch):
    lines = "the cat\n\n/nonsense\nmüller\n/temperature 0\nthe dog\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert cli.main(["chat", "--run", str(weights), "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) >= 3
    assert "The temperature is 0." in shown.out
    assert "/nonsense is no command" in shown.err
    assert "'ü'" in shown.err
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\nthe cat\n"))
    assert cli.main(["chat", "--run", str(weights)]) == 0
    assert capsys.readouterr().out == ""


def test_bytes_that_are_no_text_are_refused_and_the_conversation_goes_on(weights, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"hi \xff\n/temperature\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli.main(["chat", "--run", str(weights)]) == 0
    shown = capsys.readouterr()
    assert "lone surrogate" in shown.err
    assert "The temperature is 0.8." in shown.out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--you", " "], "you is ' '"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    ],
)
def test_bad_options_are_refused(capsys, args, said):
    assert cli.main(["chat", "--run", "none", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("slm-jax chat: ")
    assert said.partition(" is ")[0] in line
