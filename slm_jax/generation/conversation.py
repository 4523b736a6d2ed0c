"""Conversations: a prompt from a template, the answer up to its end, and no more than the model's context holds."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from slm_jax.data.templates import Message, Template
from slm_jax.generation.decode import generate
from slm_jax.model import GPTConfig, GPTModel, Params, unstack_blocks
from slm_jax.tokenizer import Tokenizer

ANSWERS_AT_A_TIME = 16


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
    """Answer conversations, each as if it were alone; the answers end where the model or the template ends them.

    Args:
        model: the model.
        params: its parameters, in any form that it runs.
        prompts: the messages of each, the last the user's.
        tokenizer: the model's.
        template: how the model was shown conversations.
        max_new_tokens: the most tokens of an answer. Of a prompt that leaves no room for them in the model's context,
            half of the context at most, the beginning is left out.
        temperature: 0 always takes the likeliest token.
        top_k: how many of the likeliest tokens are drawn from; None: all.
        key: of the draws.
        stop: called for every few answers; may raise to stop early.
    """
    room = prompt_room(model.cfg, max_new_tokens)
    ids = [tokenizer.encode(template.prompt(messages))[-room:] for messages in prompts]
    params = unstack_blocks(params)
    answers: list[str] = []
    for first in range(0, len(ids), ANSWERS_AT_A_TIME):
        stop()
        batch = ids[first : first + ANSWERS_AT_A_TIME]
        rows = generate(
            model, params, batch,
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, eos_id=tokenizer.eot_id,
            past_context="stop", key=None if key is None else jax.random.fold_in(key, first),
        )  # fmt: skip
        added = [np.asarray(row)[len(ask) :] for row, ask in zip(rows, batch, strict=True)]
        answers += [_text(ids, tokenizer, template) for ids in added]
    return answers


def prompt_room(cfg: GPTConfig, max_new_tokens: int) -> int:
    """Return how many tokens of a prompt leave room for an answer, at least half of the context."""
    return cfg.context_length - min(max_new_tokens, cfg.context_length // 2)


def _text(ids: np.ndarray, tokenizer: Tokenizer, template: Template) -> str:
    """Return the text up to the end-of-text token or a text that ends an answer."""
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    text = tokenizer.decode(ids[: ends[0]] if ends.size else ids)
    for end in template.stop:
        text = text.partition(end)[0]
    return text.strip()
