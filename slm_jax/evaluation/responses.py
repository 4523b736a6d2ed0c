"""How good the responses to instructions are: against references, and how likely a model finds the references."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from slm_jax.data.rows import Row, read_json
from slm_jax.data.templates import Message, Template, entry_messages
from slm_jax.errors import InputError, MissingInputError
from slm_jax.evaluation.logprobs import Pair, Track, continuation_logprobs, is_truncated
from slm_jax.evaluation.results import perplexity
from slm_jax.model import GPTModel, Params
from slm_jax.tokenizer import Tokenizer


class Response(NamedTuple):
    """What a model answered.

    Attributes:
        where: where the entry stands, for messages.
        messages: the conversation; the last message is the reference.
        response: the model's answer in place of the reference.
    """

    where: str
    messages: tuple[Message, ...]
    response: str

    @property
    def reference(self) -> str:
        """The answer that was expected."""
        return self.messages[-1].content


@dataclasses.dataclass(frozen=True)
class ResponseScores:
    """How near responses come to their references.

    Attributes:
        n: responses scored.
        exact_match: share of responses that are equal to their reference (:func:`exact_match`).
        rouge_l: mean of :func:`rouge_l`, 0 to 1.
    """

    n: int
    exact_match: float
    rouge_l: float


@dataclasses.dataclass(frozen=True)
class ReferenceLoss:
    """How likely a model finds the references.

    Attributes:
        n_tokens: tokens of all references, each with its end.
        n_truncated: references that are, with their prompt, longer than the model's context and lost its beginning.
        loss: mean nats a token.
        perplexity: e to the power of ``loss``.
    """

    n_tokens: int
    n_truncated: int
    loss: float
    perplexity: float


def read_responses(path: Path) -> list[Response]:
    """Read a ``responses.json``: a list of objects, each an entry with its reference and a model's answer.

    An entry has ``instruction`` and maybe ``input``, or ``messages``; the reference is ``output``, the answer
    ``model_response`` (the book's names).

    Raises:
        InputError: a file that cannot be read, or is no such list; a field that is missing, no text, or empty where
            only an answer may be.
    """
    rows = read_json(path)
    if not rows:
        raise InputError(f"{path}: an empty list; expected at least one entry with output and model_response")
    return [_response(row) for row in rows]


def _response(row: Row) -> Response:
    answer, reference = row.text("model_response"), row.text("output")
    if not reference.strip():
        raise InputError(f"{row.where}: output is empty; expected the reference to compare with, or leave it out")
    asked = entry_messages(row.fields, row.where)
    if asked[-1].role == "assistant":
        asked = asked[:-1]
    return Response(row.where, (*asked, Message("assistant", reference)), answer)


def exact_match(reference: str, response: str) -> bool:
    """Whether reference and response are equal but for white space at the ends and its amount between words."""
    return reference.split() == response.split()


def rouge_l(reference: str, response: str) -> float:
    """Return the F1 of the longest common subsequence of words of reference and response, 0 to 1 (Lin 2004, ROUGE-L).

    Words are those of google-research's ``rouge_score`` without stemming: runs of a to z and digits, in lower case.
    So text in another script has none, and a text without words scores 0, even against itself.
    """
    expected, found = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reference, response))
    if not expected or not found:
        return 0.0
    return 2 * _common_length(expected, found) / (len(expected) + len(found))


def _common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)  # of the words of a so far and the first j of b
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return lengths[-1]


def score_responses(entries: Sequence[Response]) -> ResponseScores:
    """Compare responses with their references.

    Raises:
        InputError: no response.
    """
    if not entries:
        raise InputError("no responses to score; expected at least one")
    return ResponseScores(
        n=len(entries),
        exact_match=sum(exact_match(entry.reference, entry.response) for entry in entries) / len(entries),
        rouge_l=sum(rouge_l(entry.reference, entry.response) for entry in entries) / len(entries),
    )


def reference_loss(
    model: GPTModel,
    params: Params,
    tokenizer: Tokenizer,
    template: Template,
    entries: Sequence[Response],
    *,
    batch_size: int = 8,
    track: Track = iter,
) -> ReferenceLoss:
    """Measure how likely a model finds the references, each after its prompt and up to its end-of-text token.

    Args:
        model: the model.
        params: its parameters.
        tokenizer: that of the model.
        template: how the model saw conversations in training.
        entries: whose references; what was answered does not matter.
        batch_size: references computed at a time.
        track: sees each batch go by, to show progress.

    Raises:
        InputError: no entry; a text that the tokenizer cannot encode; a model that gives NaN.
    """
    if not entries:
        raise InputError("no references to score; expected at least one")
    pairs = [_encode(tokenizer, template, entry) for entry in entries]
    logprobs, _ = continuation_logprobs(model, params, pairs, batch_size, track)
    n_tokens = sum(len(reference) for _, reference in pairs)
    loss = -float(logprobs.sum()) / n_tokens
    return ReferenceLoss(n_tokens, sum(is_truncated(model, pair) for pair in pairs), loss, perplexity(loss))


def _encode(tokenizer: Tokenizer, template: Template, entry: Response) -> Pair:
    """Encode prompt and reference each by itself, as training does."""
    reference, _ = template.pieces(entry.messages)[-1]
    try:
        return tokenizer.encode(template.prompt(entry.messages)), [*tokenizer.encode(reference), tokenizer.eot_id]
    except MissingInputError:  # of the tokenizer's own files
        raise
    except InputError as error:
        raise InputError(f"{entry.where}: {error}") from None
