"""Chat templates of pretrained models: text in Jinja's language, rendered in a process with limits."""

import atexit
import dataclasses
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from slm_jax.data.templates import TEMPLATES, Message, Template, TextTemplate
from slm_jax.errors import InputError
from slm_jax.files import check_kind
from slm_jax.tokenizer import Tokenizer

SECONDS = 10.0  # limit for rendering one conversation, which usually takes a thousandth of it
_SECONDS_TO_START = 120.0


class _Saved(TypedDict):
    source: str
    tokens: dict[str, str]
    date: str


@dataclasses.dataclass(frozen=True)
class ChatTemplate(Template):
    """A template in Jinja's language, as `transformers` renders it.

    Attributes:
        source: text of the template.
        tokens: special tokens by the names that the template uses, such as ``bos_token``.
        date: current time for the template, in ISO 8601; empty: the time of rendering.
    """

    source: str
    tokens: Mapping[str, str]
    date: str = ""

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """Return the whole text in pieces, each with whether it is a response.

        A template may mark responses (``{% generation %}``). Otherwise a response is the text that follows its prompt,
        which is the earlier conversation rendered for generation. Earlier responses that the template changes (for
        example, drops their reasoning) do not count as responses. InputError: the last one does not follow its prompt.
        """
        marked = self._render(messages)
        if len(marked) > 1:
            return [(text, bool(i % 2)) for i, text in enumerate(marked) if text]
        (text,), cuts = marked, [0]
        for end in (i for i, message in enumerate(messages, start=1) if message.role == "assistant"):
            is_last = end == len(messages)
            asked, answered = self.prompt(messages[:end]), text if is_last else self.text(messages[:end])
            if text.startswith(asked) and text.startswith(answered) and cuts[-1] <= len(asked) <= len(answered):
                cuts += [len(asked), len(answered)]
            elif is_last:
                problem = "the model's chat template does not put a response right after its prompt"
                raise InputError(f"{problem}; choose instruction.template {', '.join(TEMPLATES)} or your own")
        pairs = enumerate(itertools.pairwise([*cuts, len(text)]))
        return [(text[start:end], bool(i % 2)) for i, (start, end) in pairs if start < end]

    def text(self, messages: Sequence[Message]) -> str:
        return "".join(self._render(messages))

    def prompt(self, messages: Sequence[Message]) -> str:
        asked = messages[:-1] if messages[-1].role == "assistant" else messages
        return "".join(self._render(asked, add_generation_prompt=True))

    @cached_property
    def stop(self) -> tuple[str, ...]:
        """The text that the template writes after a response; empty if it writes nothing."""
        word = "slm-jax"  # occurs only once
        _, found, after = self.text([Message("user", "?"), Message("assistant", word)]).partition(word)
        return (after.strip(),) if found and after.strip() else ()

    def dated(self) -> "ChatTemplate":
        """Return this template with the current time fixed, if it uses the time."""
        if self.date or "strftime_now" not in self.source:
            return self
        return dataclasses.replace(self, date=datetime.now().isoformat(timespec="seconds"))

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "tokens": dict(self.tokens), "date": self.date}

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[str]:
        takes_input = "message['input']" in self.source  # as in templates that we export
        written = [
            {"role": each.role, "content": each.content, "input": each.input}
            if takes_input
            else {"role": each.role, "content": f"{each.content}\n{each.input}" if each.input else each.content}
            for each in messages
        ]
        values: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        values |= {**self.tokens, "messages": written}
        return _renderer.render({"source": self.source, "values": values, "date": self.date})


def own_template(tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """Return the template that came with a pretrained model's tokenizer; None: there was none."""
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    return ChatTemplate(tokenizer.chat_template, tokenizer.roles)


def template_from_dict(data: Mapping[str, Any], where: str = "template") -> Template:
    """Rebuild a template of any kind from the result of its ``to_dict``; InputError: invalid data."""
    if "source" not in data:
        return TextTemplate.from_dict(data, where)
    check_kind(data, _Saved, where)
    return ChatTemplate(data["source"], data["tokens"], data["date"])


class _Renderer:
    """The process that renders; started on first use, and restarted after it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def render(self, request: dict[str, Any]) -> list[str]:
        """Return the pieces of a text (`jinja_worker.render`); InputError: the template fails or exceeds a limit."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._process = self._start()
                answer = _ask(self._process, json.dumps(request), SECONDS)
            except BaseException:  # such as Ctrl-C: the next request must not read this answer
                self.close()
                raise
            if not answer:
                self.close()
                raise InputError(f"the model's chat template takes more than {SECONDS:g} s, or too much memory")
        content = json.loads(answer)
        if "error" in content:
            raise InputError(f"the model's chat template fails: {content['error']}")
        return content["pieces"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        worker, pipe = Path(__file__).with_name("jinja_worker.py"), subprocess.PIPE
        # -P: keep the script's folder out of the import path.
        process = subprocess.Popen(
            [sys.executable, "-P", str(worker)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        if _ask(process, "", _SECONDS_TO_START) != "{}\n":
            process.kill()
            raise RuntimeError(f"{sys.executable} {worker} does not start")
        return process


def _ask(process: "subprocess.Popen[str]", line: str, seconds: float) -> str:
    """Send a line and return the answer; empty if the process ended, or was killed after ``seconds``."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""
    finally:
        timer.cancel()


_renderer = _Renderer()
