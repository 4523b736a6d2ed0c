"""What must hold of templates: the exact texts, and that prompt and pieces are the same text."""

import json

import pytest
from refusals import refused

from slm_jax.data.templates import TEMPLATES, Message, TextTemplate, entry_messages, format_prompt, load_template
from slm_jax.errors import MissingInputError

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ENTRY = {"instruction": "Name a colour.", "input": "of the sky", "output": "Blue."}
GOOD = {"user_start": "Q: ", "assistant_start": "A: "}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Two\nlines"},
    {"role": "assistant", "content": "Done."},
]


def text(template, messages):
    return "".join(piece for piece, _ in TEMPLATES[template].pieces(messages))


def test_alpaca_with_an_input_is_the_books():
    expected = f"{ALPACA}\n\n### Instruction:\nName a colour.\n\n### Input:\nof the sky\n\n### Response:\n"
    assert format_prompt(ENTRY) == expected
    assert text("alpaca", entry_messages(ENTRY, "")) == expected + "Blue."
    for entry in ({"instruction": "Go."}, {"instruction": "Go.", "input": "", "output": "x"}):
        assert format_prompt(entry, "alpaca") == f"{ALPACA}\n\n### Instruction:\nGo.\n\n### Response:\n"


def test_alpaca_repeats_its_sections_over_several_turns():
    messages = entry_messages({"messages": CHAT}, "")
    assert TEMPLATES["alpaca"].pieces(messages) == [
        ("Be brief.\n\n### Instruction:\nHello?\n\n### Response:\n", False),
        ("Hi.", True),
        ("\n\n### Instruction:\nTwo\nlines\n\n### Response:\n", False),
        ("Done.", True),
    ]


# The next two are what the chat templates published with Phi-3.5-mini-instruct and, for ChatML, SmolLM2 render with
# jinja2 3.1 (system, user and assistant messages; compared for one and several turns).


def test_phi3():
    assert format_prompt(ENTRY, "phi3") == "<|user|>\nName a colour.\nof the sky<|end|>\n<|assistant|>\n"
    assert TEMPLATES["phi3"].pieces(entry_messages({"messages": CHAT}, "")) == [
        ("<|system|>\nBe brief.<|end|>\n<|user|>\nHello?<|end|>\n<|assistant|>\n", False),
        ("Hi.<|end|>\n", True),
        ("<|user|>\nTwo\nlines<|end|>\n<|assistant|>\n", False),
        ("Done.<|end|>\n", True),
    ]


def test_chatml():
    expected = "<|im_start|>user\nName a colour.\nof the sky<|im_end|>\n<|im_start|>assistant\n"
    assert format_prompt(ENTRY, "chatml") == expected
    assert text("chatml", entry_messages({"messages": CHAT}, "")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nTwo\nlines<|im_end|>\n"
        "<|im_start|>assistant\nDone.<|im_end|>\n"
    )


# What holds of each


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("entry", [ENTRY, {"messages": CHAT}], ids=["alpaca", "chat"])
def test_pieces_alternate_and_begin_with_the_prompt_and_survive_json(name, entry, tmp_path):
    template, messages = TEMPLATES[name], entry_messages(entry, "")
    pieces = template.pieces(messages)
    assert [is_response for _, is_response in pieces] == [False, True] * (len(pieces) // 2)
    assert "".join(piece for piece, _ in pieces[:-1]) == template.prompt(messages) == format_prompt(entry, name)
    assert pieces[-1][0] == messages[-1].content + template.assistant_end
    assert template.prompt(messages).endswith(template.assistant_start)
    (tmp_path / "mine.json").write_text(json.dumps(template.to_dict()), encoding="utf-8")
    assert load_template(str(tmp_path / "mine.json")) == load_template(name) == template


def test_stop_is_what_comes_after_an_answer():
    assert {name: template.stop for name, template in TEMPLATES.items()} == {
        "alpaca": ("\n\n### Instruction:",),
        "phi3": ("<|end|>",),
        "chatml": ("<|im_end|>",),
    }
    for name, template in TEMPLATES.items():
        after = text(name, entry_messages({"messages": CHAT}, "")).partition("Hi.")[2]
        assert after.startswith(template.stop[0])


def test_a_template_of_ones_own():
    template = TextTemplate.from_dict({**GOOD, "user_end": "\n", "assistant_end": "\n"})
    question, answer = Message("user", "Why?"), Message("assistant", "So.")
    assert template.pieces([question, answer, question, answer]) == [("Q: Why?\nA: ", False), ("So.\n", True)] * 2
    assert template.stop == ("Q:",)
    assert format_prompt({"instruction": "Why?", "input": "this"}, template) == "Q: Why?\nthis\nA: "


# What is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**GOOD, "user": "x"}, r"unknown field 'user'; expected user_start, assistant_start"),
        ({**GOOD, "user_end": None}, r"user_end is None; expected text"),
        ({"user_start": "Q: "}, r"no field 'assistant_start', only user_start"),
        ({**GOOD, "assistant_start": " "}, r"assistant_start is empty"),
        ({**GOOD, "user_start": "\n"}, r"nothing ends a response"),
        ([GOOD], r"expected `object`, got `array`"),
    ],
)
def test_a_file_that_is_no_template_is_refused_in_one_line(tmp_path, content, message):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with refused(f"^{file}.*{message}"):
        load_template(str(file))
    with refused(r"template 'alpacca': no such file.*alpaca, phi3, chatml", MissingInputError):
        format_prompt(ENTRY, "alpacca")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"input": "x"}, r"^entry: no field 'instruction', only input$"),
        ({"instruction": "a", "input": 5}, r"input is 5; expected text"),
        ({"messages": "hello"}, r"messages is 'hello'; expected a list of objects with role and content"),
        ({"messages": [CHAT[0], CHAT[2]]}, r"no user message"),
        ({"messages": [CHAT[1], CHAT[0]]}, r"message 2: role is 'system'.*only first"),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            r"message 1: role is 'human'; expected one of system, user",
        ),
        ({"messages": [CHAT[1], {"role": "assistant", "content": ""}]}, r"message 2: content is empty"),
    ],
)
def test_an_entry_that_cannot_be_asked_is_refused_in_one_line(entry, message):
    with refused(message):
        format_prompt(entry)
