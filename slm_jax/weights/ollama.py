"""Ollama's ``Modelfile``: which file, which text around the turns of a conversation, and where an answer ends."""

import dataclasses
import re
from contextlib import suppress

from slm_jax.data.templates import TEMPLATES, Message, Template, TextTemplate
from slm_jax.errors import InputError
from slm_jax.tokenizer import Tokenizer
from slm_jax.weights.side_files import About


def modelfile(file_name: str, context_length: int, about: About) -> str:
    """Return the Modelfile of a GGUF file beside it; a model without a template continues what it is given."""
    template = about.template
    lines = [f"FROM ./{file_name}"]
    if template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        if (plain := _as_text(template, about.tokenizer)) is not None:  # else Ollama looks for one in the file
            lines.append(f'TEMPLATE """{go_template(plain)}"""')
        lines += [f'PARAMETER stop """{end}"""' for end in (plain or template).stop]
    return "\n".join([*lines, f"PARAMETER num_ctx {context_length}", ""])


def _as_text(template: Template, tokenizer: Tokenizer | None) -> TextTemplate | None:
    """Return a template without Jinja: one of the built-in ones, perhaps with a system message by default."""
    if isinstance(template, TextTemplate):
        return template
    # Ollama puts it before the text.
    start = tokenizer.roles["bos_token"] if tokenizer is not None and tokenizer.start_ids else ""
    talk = [Message("user", "1"), Message("assistant", "2"), Message("user", "3")]
    with_system = [Message("system", "0"), *talk]
    with suppress(InputError):  # a template may refuse system messages
        for known in TEMPLATES.values():
            plain = dataclasses.replace(known, default_system="")
            first, found, rest = template.prompt(talk).removeprefix(start).partition(plain.prompt(talk))
            if found and not rest and template.prompt(with_system).removeprefix(start) == plain.prompt(with_system):
                return dataclasses.replace(plain, default_system=first)
    return None


def go_template(template: TextTemplate) -> str:
    """Return a template in the language of Go's ``text/template``, as Ollama fills it in."""
    turns = {
        "system": (template.system_start, template.system_end),
        "user": (template.user_start, template.user_end),
        "assistant": (template.assistant_start, template.assistant_end),
    }
    cases = [
        f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}{_text(start)}{{{{ .Content }}}}{_text(end)}'
        for number, (role, (start, end)) in enumerate(turns.items())
    ]
    default = template.default_system
    first = f"{{{{ if not .System }}}}{_text(default)}{{{{ end }}}}" if default else ""
    messages = f"{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}"
    return first + messages + _text(template.assistant_start)


def _text(text: str) -> str:
    """Write what has a meaning in a Go template or ends a quoted text of a Modelfile as a string in an action."""
    return re.sub(r'\{\{|"', lambda found: "{{ `" + found[0] + "` }}", text)
