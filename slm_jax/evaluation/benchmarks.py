"""LAMBADA and HellaSwag, scored as EleutherAI's lm-evaluation-harness scores them with no examples in the prompt."""

import dataclasses
import re

import numpy as np

from slm_jax.errors import InputError, MissingInputError
from slm_jax.evaluation.logprobs import Pair, Track, continuation_logprobs, encode_pair, is_truncated
from slm_jax.evaluation.results import perplexity, standard_error
from slm_jax.evaluation.rows import Row, read_rows
from slm_jax.model import GPTModel, Params
from slm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LambadaResult:
    """How well last words are predicted.

    Attributes:
        source: as it was named.
        n_examples: passages scored.
        n_truncated: of these, how many are longer than the model's context and lost their beginning.
        acc: share of passages in which each token of the last word is the likeliest.
        acc_stderr: its standard error; NaN for one passage.
        perplexity: e to the power of the mean over passages of the last word's negative log-probability.
    """

    source: str
    n_examples: int
    n_truncated: int
    acc: float
    acc_stderr: float
    perplexity: float


@dataclasses.dataclass(frozen=True)
class HellaSwagResult:
    """How often the right ending is the likeliest.

    Attributes:
        source: as it was named.
        n_examples: contexts scored, each with all its endings.
        n_truncated: of these, how many are longer than the model's context and lost their beginning.
        acc: share of examples in which the right ending has the largest log-probability.
        acc_stderr: its standard error; NaN for one example.
        acc_norm: the same by log-probability a character of the ending, which longer endings do not suffer from.
        acc_norm_stderr: its standard error.
    """

    source: str
    n_examples: int
    n_truncated: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float


def lambada(
    model: GPTModel,
    params: Params,
    tokenizer: Tokenizer,
    source: str,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    track: Track = iter,
) -> LambadaResult:
    """Score the prediction of each passage's last word (Paperno et al. 2016).

    The context is the text up to its last space, the target that space and the last word, as in the harness's
    ``lambada_openai``; white space after the last word is left out. TensorFlow Datasets has the original texts, lower
    case and with spaces around punctuation (``lambada_standard``), on which figures are worse.

    Args:
        model: the model.
        params: its parameters.
        tokenizer: that of the model.
        source: ``jsonl:FILE`` with ``text`` in each line, or ``tfds:lambada[:SPLIT]`` (default: test).
        batch_size: passages computed at a time.
        limit: only so many from the start.
        track: sees each batch go by, to show progress.

    Raises:
        InputError: a source that cannot be read, or a line that is not such an example.
    """
    rows = read_rows(source, "lambada", limit)
    pairs = [_lambada_pair(tokenizer, row) for row in rows]
    logprobs, is_greedy = continuation_logprobs(model, params, pairs, batch_size, track)
    acc = float(is_greedy.mean())
    return LambadaResult(
        source=source,
        n_examples=len(rows),
        n_truncated=sum(is_truncated(model, pair) for pair in pairs),
        acc=acc,
        acc_stderr=standard_error(acc, len(rows)),
        perplexity=perplexity(-float(logprobs.mean())),
    )


def hellaswag(
    model: GPTModel,
    params: Params,
    tokenizer: Tokenizer,
    source: str,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    track: Track = iter,
) -> HellaSwagResult:
    """Score the choice among endings of a context (Zellers et al. 2019).

    The context is ``activity_label: ctx_a Ctx_b``, with ``ctx_b`` capitalised, and each ending follows after a space;
    WikiHow's marks in brackets are taken out. Where a line has no ``ctx_a`` and ``ctx_b`` (as in TensorFlow
    Datasets), ``ctx`` is used as it is, which differs in that one capital letter and so a little in the figures.

    Args:
        model: the model.
        params: its parameters.
        tokenizer: that of the model.
        source: ``jsonl:FILE`` with ``activity_label``, ``ctx_a`` and ``ctx_b`` (or ``ctx``), ``endings`` and ``label``
            in each line, or ``tfds:hellaswag[:SPLIT]`` (default: validation; the test split has no labels).
        batch_size: endings computed at a time.
        limit: only so many examples from the start.
        track: sees each batch go by, to show progress.

    Raises:
        InputError: a source that cannot be read, or a line that is not such an example.
    """
    rows = read_rows(source, "hellaswag", limit)
    examples = [_hellaswag_example(tokenizer, row) for row in rows]
    pairs = [pair for example in examples for pair in example.pairs]
    logprobs, _ = continuation_logprobs(model, params, pairs, batch_size, track)
    by_example = np.split(logprobs, np.cumsum([len(example.pairs) for example in examples])[:-1])
    scored = list(zip(by_example, examples, strict=True))
    acc = float(np.mean([scores.argmax() == example.label for scores, example in scored]))
    acc_norm = float(np.mean([(scores / example.lengths).argmax() == example.label for scores, example in scored]))
    return HellaSwagResult(
        source=source,
        n_examples=len(rows),
        n_truncated=sum(any(is_truncated(model, pair) for pair in example.pairs) for example in examples),
        acc=acc,
        acc_stderr=standard_error(acc, len(rows)),
        acc_norm=acc_norm,
        acc_norm_stderr=standard_error(acc_norm, len(rows)),
    )


def _lambada_pair(tokenizer: Tokenizer, row: Row) -> Pair:
    text = row.text("text").rstrip()
    if not text:
        raise InputError(f"{row.where}: text is empty; expected a passage")
    context, _, last_word = text.rpartition(" ")
    return _encode(tokenizer, row, context, f" {last_word}")


@dataclasses.dataclass(frozen=True)
class _Example:
    """An example of HellaSwag, encoded; ``lengths`` are the endings' characters."""

    pairs: list[Pair]
    lengths: np.ndarray
    label: int


def _hellaswag_example(tokenizer: Tokenizer, row: Row) -> _Example:
    endings = row.field("endings")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e.strip() for e in endings):
        raise InputError(f"{row.where}: endings is {endings!r:.60}; expected a list of at least two texts")
    context = _without_brackets(f"{row.text('activity_label')}: {_hellaswag_context(row)}")
    endings = [_without_brackets(ending) for ending in endings]
    return _Example(
        pairs=[_encode(tokenizer, row, context, f" {ending}") for ending in endings],
        lengths=np.array([len(ending) or 1e-9 for ending in endings]),  # one of nothing is never chosen by acc_norm
        label=_label(row, len(endings)),
    )


def _hellaswag_context(row: Row) -> str:
    if "ctx" in row.fields and not {"ctx_a", "ctx_b"} <= row.fields.keys():
        return row.text("ctx")
    return f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"


def _without_brackets(text: str) -> str:
    """Take WikiHow's marks out of a text, as the harness does, step for step."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _label(row: Row, n_endings: int) -> int:
    label = row.fields.get("label", "")
    if label in ("", -1, "-1"):
        raise InputError(f"{row.where}: the example has no label; use a labelled split, such as validation")
    number = int(label) if isinstance(label, str) and label.isdecimal() and len(label) < 9 else label
    if type(number) is not int or not 0 <= number < n_endings:
        raise InputError(f"{row.where}: label is {label!r:.60}; expected a number from 0 to {n_endings - 1}")
    return number


def _encode(tokenizer: Tokenizer, row: Row, context: str, continuation: str) -> Pair:
    try:
        return encode_pair(tokenizer, context, continuation)
    except MissingInputError:  # of the tokenizer's own files
        raise
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None
