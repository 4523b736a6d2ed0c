"""LAMBADA and HellaSwag, scored zero-shot as EleutherAI's lm-evaluation-harness scores them."""

import dataclasses
import re
from typing import Any

import numpy as np

from slm_jax.data.rows import Row
from slm_jax.data.sources import parse_source
from slm_jax.errors import InputError, located
from slm_jax.evaluation.logprobs import Pair, Scorer
from slm_jax.evaluation.results import perplexity, standard_error

# Each benchmark in TensorFlow Datasets: the split that is scored, and the fields that have another name there.
_TFDS = {
    "lambada": ("test", {"passage": "text"}),
    "hellaswag": ("validation", {"context": "ctx"}),
}


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """Result of a benchmark.

    Attributes:
        source: source of the examples, as given.
        n_examples: number of examples scored.
        n_truncated: examples that are longer than the model's context and were truncated on the left.
        acc: accuracy: share of passages whose last word has the most likely tokens (LAMBADA), or of contexts whose
            right ending has the largest log-probability (HellaSwag).
        acc_stderr: standard error of ``acc``; NaN for one example.
    """

    source: str
    n_examples: int
    n_truncated: int
    acc: float
    acc_stderr: float


@dataclasses.dataclass(frozen=True)
class LambadaResult(BenchmarkResult):
    """``perplexity``: exp of the mean over passages of the last word's negative log-probability (nats)."""

    perplexity: float


@dataclasses.dataclass(frozen=True)
class HellaSwagResult(BenchmarkResult):
    """``acc_norm``: accuracy by log-probability per character of the ending, which doesn't favour short endings."""

    acc_norm: float
    acc_norm_stderr: float


def lambada(scorer: Scorer, source: str, limit: int | None = None) -> LambadaResult:
    """Score the prediction of each passage's last word (Paperno et al. 2016).

    The context is the text up to its last space, the target that space and the last word, as in the harness's
    ``lambada_openai``; trailing white space is removed. TensorFlow Datasets has the original texts, lower case and
    with spaces around punctuation (``lambada_standard``), on which scores are lower.

    Args:
        scorer: the model and its tokenizer.
        source: ``jsonl:FILE`` with ``text`` in each line, or ``tfds:lambada[:SPLIT]`` (default: test).
        limit: score only the first ``limit`` passages.

    Raises:
        InputError: the source cannot be read, or an example is malformed.
    """
    pairs = []
    for row in read_examples(source, "lambada", limit):
        text = row.filled("text").rstrip()
        context, _, last_word = text.rpartition(" ")
        with located(row.where):
            pairs.append(scorer.encode(context, f" {last_word}"))
    logprobs, is_greedy = scorer.score(pairs)
    return LambadaResult(
        **_common(source, [scorer.is_truncated(pair) for pair in pairs], is_greedy),
        perplexity=perplexity(-float(logprobs.mean())),
    )


def hellaswag(scorer: Scorer, source: str, limit: int | None = None) -> HellaSwagResult:
    """Score the choice among endings of a context (Zellers et al. 2019); arguments and errors as :func:`lambada`.

    The context is ``activity_label: ctx_a Ctx_b``, with ``ctx_b`` capitalised; each ending follows after a space, and
    WikiHow's bracketed markers are removed. If a line has no ``ctx_a`` and ``ctx_b`` (as in TensorFlow Datasets),
    ``ctx`` is used as it is, which differs in that one capital letter and changes the scores slightly. ``source`` is
    ``jsonl:FILE`` with these fields, ``endings`` and ``label``, or ``tfds:hellaswag[:SPLIT]`` (default: validation;
    the test split has no labels).
    """
    examples = [_hellaswag_example(scorer, row) for row in read_examples(source, "hellaswag", limit)]
    pairs = [pair for example in examples for pair in example.pairs]
    by_example = np.split(scorer.score(pairs)[0], np.cumsum([len(example.pairs) for example in examples])[:-1])
    scored = list(zip(by_example, examples, strict=True))
    hits = np.array([scores.argmax() == example.label for scores, example in scored])
    acc_norm = float(np.mean([(scores / example.lengths).argmax() == example.label for scores, example in scored]))
    return HellaSwagResult(
        **_common(source, [any(map(scorer.is_truncated, example.pairs)) for example in examples], hits),
        acc_norm=acc_norm,
        acc_norm_stderr=standard_error(acc_norm, len(examples)),
    )


def _common(source: str, truncated: list[bool], hits: np.ndarray) -> dict[str, Any]:
    acc = float(hits.mean())
    return {
        "source": source,
        "n_examples": len(hits),
        "n_truncated": sum(truncated),
        "acc": acc,
        "acc_stderr": standard_error(acc, len(hits)),
    }


def read_examples(source: str, benchmark: str, limit: int | None) -> list[Row]:
    """Read the first ``limit`` examples (None: all) of ``lambada`` or ``hellaswag`` from a source of rows.

    Raises:
        InputError: a source that cannot be read; no examples.
    """
    split, renamed = _TFDS[benchmark]
    rows = parse_source(source, split=split).read_rows(limit)
    return [Row(row.where, {renamed.get(name, name): value for name, value in row.fields.items()}) for row in rows]


@dataclasses.dataclass(frozen=True)
class _Example:
    """An encoded example of HellaSwag; ``lengths``: characters of each ending."""

    pairs: list[Pair]
    lengths: np.ndarray
    label: int


def _hellaswag_example(scorer: Scorer, row: Row) -> _Example:
    endings = row.field("endings")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e.strip() for e in endings):
        raise InputError(f"{row.where}: endings is {endings!r:.60}; expected a list of at least two texts")
    if "ctx" in row.fields and not {"ctx_a", "ctx_b"} <= row.fields.keys():
        text = row.text("ctx")
    else:
        text = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    context = _without_brackets(f"{row.text('activity_label')}: {text}")
    endings = [_without_brackets(ending) for ending in endings]
    with located(row.where):
        pairs = [scorer.encode(context, f" {ending}") for ending in endings]
    # acc_norm never chooses an empty ending
    return _Example(pairs, np.array([len(ending) or 1e-9 for ending in endings]), _label(row, len(endings)))


def _without_brackets(text: str) -> str:
    """Remove WikiHow's markers exactly as the harness does."""
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
