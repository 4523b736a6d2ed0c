"""Responses to instructions: compared with references, and the loss of the references under a model."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.data.sources import parse_source
from slm_jax.data.templates import Message, Template, encode_conversation, entry_messages
from slm_jax.errors import InputError, located
from slm_jax.evaluation.logprobs import Scorer, perplexity


class Response(NamedTuple):
    """An instruction with a model's response and the reference."""

    where: str  # location of the entry, for error messages
    messages: tuple[Message, ...]  # the last one is the reference
    response: str

    @property
    def reference(self) -> str:
        """The expected response."""
        return self.messages[-1].content


def read_responses(path: Path) -> list[Response]:
    """Read a ``responses.json``: a list of entries, each with a reference and a model's response.

    An entry has ``instruction`` and optionally ``input``, or ``messages``; the reference is ``output``, the response
    ``model_response`` (the book's names).
    """
    responses = []
    for row in parse_source(f"json:{path}").read_rows():
        answer, reference = row.text("model_response"), row.text("output")
        if not reference.strip():
            raise InputError(f"{row.where}: output is empty; expected a reference")
        asked = entry_messages(row.fields, row.where)
        if asked[-1].role == "assistant":
            asked = asked[:-1]
        responses.append(Response(row.where, (*asked, Message("assistant", reference)), answer))
    return responses


def exact_match(reference: str, response: str) -> bool:
    """Whether reference and response are equal, up to white space."""
    return reference.split() == response.split()


def rouge_l(reference: str, response: str) -> float:
    """Return ROUGE-L: the F1 of the longest common subsequence of words, 0 to 1 (Lin 2004).

    Words are those of google-research's ``rouge_score`` without stemming: runs of a to z and digits, in lower case. A
    text without such words (for example in another script) scores 0, even against itself.
    """
    expected, found = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reference, response))
    if not expected or not found:
        return 0.0
    lengths = [0] * (len(found) + 1)  # of the common subsequence of the words so far and the first j found
    for word in expected:
        diagonal = 0
        for j, other in enumerate(found, start=1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return 2 * lengths[-1] / (len(expected) + len(found))


def score_responses(entries: Sequence[Response]) -> dict[str, Any]:
    """Compare responses, at least one, with their references: the means of :func:`exact_match` and :func:`rouge_l`."""
    pairs, n = [(entry.reference, entry.response) for entry in entries], len(entries)
    return {
        "n": n,
        "exact_match": sum(exact_match(*pair) for pair in pairs) / n,
        "rouge_l": sum(rouge_l(*pair) for pair in pairs) / n,
    }


def reference_loss(scorer: Scorer, template: Template, entries: Sequence[Response]) -> dict[str, Any]:
    """Measure the loss of the references, each after its prompt in the template and up to its end-of-text token.

    The responses of ``entries`` are not used.

    Returns:
        The figures: ``loss`` in nats per token, ``perplexity``, ``n_tokens``, and ``n_truncated``, how many references
        don't fit the model's context with their prompt, which was truncated on the left.
    """
    pairs = []
    for entry in entries:
        with located(entry.where):
            *before, (reference_ids, _) = encode_conversation(scorer.tokenizer, template, entry.messages)
        pairs.append(([id_ for ids, _ in before for id_ in ids], reference_ids))
    n_tokens = sum(len(reference) for _, reference in pairs)
    loss = -float(scorer.score(pairs)[0].sum()) / n_tokens
    n_truncated = sum(map(scorer.is_truncated, pairs))
    return {"n_tokens": n_tokens, "n_truncated": n_truncated, "loss": loss, "perplexity": perplexity(loss)}
