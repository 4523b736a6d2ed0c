"""Conversations: a prompt from a template, the answer up to its end, within the model's context."""

import dataclasses
import sys
from collections.abc import Callable, Generator, Sequence

import jax
import numpy as np

from slm_jax.data.templates import TEMPLATES, Message, Template, encode_prompt
from slm_jax.errors import InputError
from slm_jax.generation.config import Sampling
from slm_jax.generation.decode import end_ids, generate, stream_text
from slm_jax.model import GPTConfig, GPTModel, Params
from slm_jax.nn.blocks import unstack_blocks
from slm_jax.tokenizer import Tokenizer

ANSWERS_AT_A_TIME = 16


def template_or_alpaca(template: Template | None, source: object) -> Template:
    """Return a model's template; if it has none, Alpaca's, with a warning on stderr that names ``source``."""
    if template is None:
        print(f"{source}: was not trained on instructions; using the template alpaca", file=sys.stderr)
        return TEMPLATES["alpaca"]
    return template


def prompt_room(cfg: GPTConfig, max_new_tokens: int) -> int:
    """Return how many tokens of a prompt leave room for an answer, at least half of the context."""
    return cfg.context_length - min(max_new_tokens, cfg.context_length // 2)


def answer(
    model: GPTModel,
    params: Params,
    prompts: Sequence[Sequence[Message]],
    *,
    tokenizer: Tokenizer,
    template: Template,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
    stop: Callable[[], None] = lambda: None,
) -> list[str]:
    """Answer conversations independently of each other, each up to an end-of-text token or the template's stop text.

    The last message of each conversation is the user's. A prompt of more than :func:`prompt_room` tokens is truncated
    on the left. ``stop`` is called before each batch and may raise to stop early. Other arguments as for
    :func:`slm_jax.generate`, but greedy by default.
    """
    room, eos_ids = prompt_room(model.cfg, max_new_tokens), end_ids(tokenizer, template.stop)
    ids = [encode_prompt(tokenizer, template, messages)[-room:] for messages in prompts]
    params = unstack_blocks(params)
    answers: list[str] = []
    for first in range(0, len(ids), ANSWERS_AT_A_TIME):
        stop()
        batch = ids[first : first + ANSWERS_AT_A_TIME]
        rows = generate(
            model, params, batch,
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, eos_id=eos_ids,
            past_context="stop", key=None if key is None else jax.random.fold_in(key, first),
        )  # fmt: skip
        for row, prompt in zip(rows, batch, strict=True):
            new = np.asarray(row)[len(prompt) :]
            ends = np.flatnonzero(np.isin(new, eos_ids))
            text = tokenizer.decode(new[: ends[0]] if ends.size else new)
            for end in template.stop:
                text = text.partition(end)[0]
            answers.append(text.strip())
    return answers


@dataclasses.dataclass
class Conversation:
    """A conversation with a model, which remembers its turns."""

    model: GPTModel
    params: Params
    tokenizer: Tokenizer
    template: Template
    sampling: Sampling  # may be replaced between answers
    max_new_tokens: int
    introduction: str = ""  # system message at the start; empty: none
    seed: int = 0  # from which and the number of the answer each answer's random key is made
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # the oldest go when the context is full
    n_answers: int = 0

    def __post_init__(self) -> None:
        self.params = unstack_blocks(self.params)

    def answer(self, message: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece; it is remembered even if the iterator is closed early."""
        turns, _, prompt_ids = self._fit(message)
        pieces = stream_text(
            self.model, self.params, self.tokenizer, prompt_ids, self.sampling,
            max_new_tokens=self.max_new_tokens, stop=self.template.stop, past_context="stop",
            key=jax.random.fold_in(jax.random.key(self.seed), self.n_answers),
        )  # fmt: skip
        self.turns = turns
        self.n_answers += 1

        def remember() -> Generator[str, None, None]:
            answer = ""
            try:
                for piece in pieces:
                    shown = piece if answer.strip() else piece.lstrip()
                    answer += piece
                    yield shown
            finally:
                self.turns.append((message, answer.rstrip()))  # with leading space, as the model wrote it

        return remember()

    def prompt(self, message: str) -> str:
        """Return the text that the answer to a message would continue; errors as for :meth:`answer`."""
        return self.template.prompt(self._fit(message)[1])

    def _fit(self, message: str) -> tuple[list[tuple[str, str]], list[Message], list[int]]:
        """Return the latest turns that leave room for an answer, all messages with them, and their ids."""
        room = prompt_room(self.model.cfg, self.max_new_tokens)
        system = [Message("system", self.introduction)] if self.introduction else []
        for first in range(len(self.turns) + 1):
            messages = list(system)
            for question, answer in self.turns[first:]:
                messages += [Message("user", question), Message("assistant", answer)]
            messages.append(Message("user", message))
            ids = encode_prompt(self.tokenizer, self.template, messages)
            if len(ids) <= room:
                return self.turns[first:], messages, ids
        raise InputError(f"the message in its template makes {len(ids)} tokens; expected at most {room} of the context")
