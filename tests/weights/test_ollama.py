"""What must hold of a Modelfile: Ollama writes a conversation as we do, and stops where an answer ends."""

import re

import pytest

from slm_jax.data.chat_template import ChatTemplate
from slm_jax.data.templates import TEMPLATES, Message, TextTemplate
from slm_jax.weights.ollama import modelfile
from slm_jax.weights.side_files import About

TALK = [Message("user", "Say {{ hi }}"), Message("assistant", 'He said "hi"'), Message("user", "Again")]


def render(template, messages):
    """Fill in a template as Go's text/template does, as far as our templates use it."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)  # texts and actions take turns
    position = 0

    def block(**values):
        """Render up to the end of the block, or to its next branch; return the text and what ended it."""
        nonlocal position
        out = parts[position]
        while (position := position + 2) < len(parts):
            action = parts[position - 1]
            if action == "end" or action.startswith("else"):
                return out, action
            if action == "range .Messages":
                start = position
                for message in messages:
                    position = start
                    out += block(message=message)[0]
            elif action.startswith("if "):
                out += branches(action, values)
            else:
                out += action[1:-1] if action[0] == "`" else {".Content": values["message"].content}[action]
            out += parts[position]
        return out, None

    def branches(action, values):
        found = ""
        taken = False
        while action != "end":
            condition = re.fullmatch(r'(?:else )?if (?:not (\.System)|eq \.Role "(\w+)")', action)
            holds = (
                not any(m.role == "system" for m in messages)
                if condition[1]
                else values["message"].role == condition[2]
            )
            text, action = block(**values)
            if holds and not taken:
                found, taken = text, True
        return found

    return block()[0]


def template_of(text):
    return re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]


ODD = TextTemplate(user_start='{{ "user" }} ', assistant_start='"""bot""" ', assistant_end='"', default_system="{{")


# SmolLM2's, in other words: ChatML with a system message by default.
JINJA = ChatTemplate(
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    {},
)
KNOWN = {**TEMPLATES, "odd": ODD, "jinja": JINJA}


@pytest.mark.parametrize("template", KNOWN.values(), ids=KNOWN.keys())
@pytest.mark.parametrize("system", [[], [Message("system", "Be brief.")]], ids=["", "system"])
def test_ollama_writes_a_conversation_as_we_do(template, system):
    found = render(template_of(modelfile("model.gguf", 64, About(name="x", template=template))), [*system, *TALK])
    assert found == template.prompt([*system, *TALK])


def test_the_file_names_the_model_and_where_an_answer_ends():
    text = modelfile("model.gguf", 64, About(name="x", template=TEMPLATES["chatml"]))
    assert text.splitlines()[0] == "FROM ./model.gguf"
    assert 'PARAMETER stop """<|im_end|>"""' in text
    assert text.endswith("PARAMETER num_ctx 64\n")


def test_a_template_that_go_cannot_express_is_left_to_ollama():
    strange = ChatTemplate("{{ messages | length }}{% if add_generation_prompt %}>{% endif %}", {})
    assert "TEMPLATE" not in modelfile("model.gguf", 64, About(name="x", template=strange))


def test_a_model_without_a_template_continues_a_text():
    assert template_of(modelfile("model.gguf", 64, About(name="x"))) == "{{ .Prompt }}"
