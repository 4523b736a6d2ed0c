"""Templates: how a conversation is written as one text, in training, generation and chat.

A template is data, so that it can be saved with a run. The built-in ones are from Stanford Alpaca (as in the book's
chapter 7), and from the chat templates published with Phi-3 and, as ChatML, with Qwen and SmolLM.
"""

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

from slm_jax.data.rows import Row
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import read_json, user_path
from slm_jax.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``input`` is the separate input of an instruction (Alpaca)."""

    role: Role
    content: str
    input: str = ""


class Template(ABC):
    """How a conversation is written: a `TextTemplate`, or a pretrained model's own (`slm_jax.data.chat_template`)."""

    @property
    @abstractmethod
    def stop(self) -> tuple[str, ...]:
        """The texts that end a response, if no end-of-text token does."""

    @abstractmethod
    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """Return the whole text in pieces, each with whether it is a response (including the text that ends it)."""

    def text(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation."""
        return "".join(text for text, _ in self.pieces(messages))

    @abstractmethod
    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text up to the start of the last response, without a final message of the assistant."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the template as plain JSON data."""


@dataclasses.dataclass(frozen=True)
class TextTemplate(Template):
    """The text around the turns of a conversation.

    Attributes:
        user_start: text before a user's message.
        assistant_start: text before a response; a prompt ends with it.
        user_end: text after a user's message.
        assistant_end: text after a response; it counts in the loss.
        system_start: text before a system message.
        system_end: text after a system message.
        input_start: text between an instruction and its input, if it has one.
        default_system: start of a conversation without a system message.
    """

    user_start: str
    assistant_start: str
    user_end: str = ""
    assistant_end: str = ""
    system_start: str = ""
    system_end: str = ""
    input_start: str = "\n"
    default_system: str = ""

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.assistant_end.rstrip() or self.user_start.rstrip(),)

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        turns = [(self.default_system, False)] if self.default_system and messages[0].role != "system" else []
        for message in messages:
            if message.role == "assistant":
                turns += [(self.assistant_start, False), (message.content + self.assistant_end, True)]
            elif message.role == "system":
                turns.append((self.system_start + message.content + self.system_end, False))
            else:
                about = self.input_start + message.input if message.input else ""
                turns.append((self.user_start + message.content + about + self.user_end, False))
        grouped = itertools.groupby(turns, key=lambda turn: turn[1])
        return [("".join(text for text, _ in group), is_response) for is_response, group in grouped]

    def prompt(self, messages: Sequence[Message]) -> str:
        asked = messages[:-1] if messages[-1].role == "assistant" else messages
        return self.text(asked) + self.assistant_start

    def to_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "template") -> "TextTemplate":
        """Rebuild a template from the result of :meth:`to_dict`; only the first two fields are required.

        InputError: a field is unknown, missing or not text; no text marks where a response begins or ends.
        """
        row, fields = Row(where, data), [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in data if name not in fields]:
            raise InputError(f"{where}: unknown field {unknown[0]!r}; expected {', '.join(fields)}")
        row.filled("assistant_start")
        template = cls(**{name: row.text(name) for name in ("user_start", *data)})
        if not all(template.stop):
            raise InputError(f"{where}: assistant_end and user_start are blank, so nothing ends a response")
        return template


TEMPLATES = {
    "alpaca": TextTemplate(
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        user_start="\n\n### Instruction:\n",
        input_start="\n\n### Input:\n",
        assistant_start="\n\n### Response:\n",
    ),
    "phi3": TextTemplate(
        system_start="<|system|>\n",
        system_end="<|end|>\n",
        user_start="<|user|>\n",
        user_end="<|end|>\n",
        assistant_start="<|assistant|>\n",
        assistant_end="<|end|>\n",
    ),
    "chatml": TextTemplate(
        system_start="<|im_start|>system\n",
        system_end="<|im_end|>\n",
        user_start="<|im_start|>user\n",
        user_end="<|im_end|>\n",
        assistant_start="<|im_start|>assistant\n",
        assistant_end="<|im_end|>\n",
    ),
}


def load_template(name_or_path: str) -> TextTemplate:
    """Return a built-in template, or one from a JSON file with the fields of `TextTemplate`; InputError: neither."""
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    path = user_path(name_or_path)
    if not path.is_file():
        raise MissingInputError(
            f"template {name_or_path!r}: no such file or built-in template ({', '.join(TEMPLATES)})"
        )
    return TextTemplate.from_dict(read_json(path), str(path))


def format_prompt(entry: Mapping[str, Any], template: str | Template = "alpaca") -> str:
    r"""Return the prompt of an entry: with Alpaca's template up to and including "### Response:\n".

    Args:
        entry: ``{"instruction": …, "input": …}`` (``input`` is optional; an ``output`` is ignored), or
            ``{"messages": [{"role": …, "content": …}, …]}``.
        template: a template, or an argument of :func:`load_template`.

    Raises:
        InputError: a field is missing, empty or not text; no such template.
    """
    if isinstance(template, str):
        template = load_template(template)
    return template.prompt(entry_messages(entry, "entry"))


def entry_messages(entry: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """Return the turns of an entry; the last one is the assistant's if the entry has an output or ends with one.

    An entry is Alpaca's (``instruction``, ``output``, and perhaps ``input``), Dolly's (``instruction``, ``response``,
    ``context``), or a chat (``messages``, each with ``role`` and ``content``). An input or context may be null.

    Raises:
        EmptyField: a field is empty.
        InputError: a field is missing or not text; an unknown role; no user message.
    """
    row = Row(where, entry)
    if "messages" in entry:
        return _chat(entry["messages"], where)
    is_dolly = "response" in entry and "output" not in entry
    about, answer = ("context", "response") if is_dolly else ("input", "output")
    question = Message("user", row.filled("instruction"), "" if entry.get(about) is None else row.text(about))
    return (question, Message("assistant", row.filled(answer))) if answer in entry else (question,)


def _chat(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"{where}: messages is {messages!r:.60}; expected a list of objects with role and content")
    turns: list[Message] = []
    for number, message in enumerate(messages, start=1):
        row = Row(f"{where}, message {number}", message)
        role = row.filled("role")
        if role not in get_args(Role) or (role == "system" and number > 1):
            expected = ", ".join(get_args(Role))
            raise InputError(f"{row.where}: role is {role!r:.60}; expected one of {expected} (system only first)")
        turns.append(Message(cast(Role, role), row.filled("content")))
    asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
    if not any(turn.role == "user" for turn in asked):
        raise InputError(f"{where}: no user message to answer; expected role user before the last answer")
    return tuple(turns)


# Tokens

# Inserted into special tokens in messages, which are split there and become ordinary text, so that a message cannot
# forge the end of its turn. Unicode reserves this character for internal use in programs.
_CUT = "\ufdd0"


def encode_prompt(tokenizer: Tokenizer, template: Template, messages: Sequence[Message]) -> list[int]:
    """Return the ids before the next response; special tokens in earlier responses count as the model's own.

    InputError: the tokenizer cannot encode a text.
    """
    plain = [each if each.role == "assistant" else _plain(tokenizer, each) for each in messages]
    (ids,) = _encode(tokenizer, [template.prompt(plain)])
    return _start(tokenizer, template) + ids or [tokenizer.eot_id]


def encode_conversation(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Message]
) -> list[tuple[list[int], bool]]:
    """Return the ids of a conversation in pieces, each with whether it is a response; the last one is.

    The last response ends with one of the end-of-text ids. InputError: the tokenizer cannot encode a text.
    """
    texts = template.pieces([_plain(tokenizer, each) for each in messages])
    pieces = [(_start(tokenizer, template), False)]
    for ids, (_, is_response) in zip(_encode(tokenizer, [text for text, _ in texts]), texts, strict=True):
        # The model does not write what follows the end of a response.
        end = next((i + 1 for i, id_ in enumerate(ids) if is_response and id_ in tokenizer.eos_ids), len(ids))
        pieces += [(ids[:end], is_response), (ids[end:], False)]
    while not pieces[-1][1]:
        pieces.pop()
    if not set(pieces[-1][0][-1:]) & set(tokenizer.eos_ids):
        pieces[-1][0].append(tokenizer.eot_id)
    return pieces


def _start(tokenizer: Tokenizer, template: Template) -> list[int]:
    """Return the ids that the model expects before a text; a model's own template writes them itself."""
    return tokenizer.start_ids if isinstance(template, TextTemplate) else []


def _plain(tokenizer: Tokenizer, message: Message) -> Message:
    content, more = message.content, message.input
    for token in tokenizer.special_tokens:
        cut = token[:1] + _CUT + token[1:]
        content, more = content.replace(token, cut), more.replace(token, cut)
    return dataclasses.replace(message, content=content, input=more)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each part of a text; texts are also split at `_CUT`."""
    ids: list[list[int]] = [[] for _ in texts]
    runs: list[list[tuple[int, str]]] = [[]]  # encoded together: indices of parts, and their texts
    for i, text in enumerate(texts):
        first, *rest = text.split(_CUT)
        runs[-1].append((i, first))
        runs += [[(i, each)] for each in rest]
    for n, run in enumerate(runs):
        encoder = tokenizer.continued() if n else tokenizer
        for (i, _), new in zip(run, encoder.encode_parts([text for _, text in run]), strict=True):
            ids[i] += new
    return ids
