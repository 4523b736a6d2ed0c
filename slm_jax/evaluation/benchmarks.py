"""LAMBADA and HellaSwag, scored zero-shot as EleutherAI's lm-evaluation-harness scores them."""

import math
import re
from typing import Any

import numpy as np

from slm_jax.data.rows import Row
from slm_jax.data.sources import parse_source
from slm_jax.errors import InputError, located
from slm_jax.evaluation.logprobs import Scorer, perplexity

# Each benchmark in TensorFlow Datasets: the split that is scored, and the fields that have another name there.
_TFDS = {
    "lambada": ("test", {"passage": "text"}),
    "hellaswag": ("validation", {"context": "ctx"}),
}


def lambada(scorer: Scorer, source: str, limit: int | None = None) -> dict[str, Any]:
    """Score the prediction of each passage's last word (Paperno et al. 2016).

    The context is the text up to its last space, the target that space and the last word, as in the harness's
    ``lambada_openai``; trailing white space is removed. TensorFlow Datasets has the original texts, lower case and
    with spaces around punctuation (``lambada_standard``), on which scores are lower.

    ``source`` is ``jsonl:FILE`` with ``text`` in each line, or ``tfds:lambada[:SPLIT]`` (default: test); only its first
    ``limit`` passages are scored.

    Returns:
        The figures: ``acc``, the share of passages whose last word has the most likely tokens, its standard error,
        ``perplexity`` of the last words (each counts once), and ``n_truncated``, how many examples are longer than the
        model's context and were truncated on the left.
    """
    pairs = []
    for row in read_examples(source, "lambada", limit):
        text = row.filled("text").rstrip()
        context, _, last_word = text.rpartition(" ")
        with located(row.where):
            pairs.append(scorer.encode(context, f" {last_word}"))
    logprobs, is_greedy = scorer.score(pairs)
    return {
        **_common(source, [scorer.is_truncated(pair) for pair in pairs]),
        **_accuracy("acc", is_greedy),
        "perplexity": perplexity(-float(logprobs.mean())),
    }


def hellaswag(scorer: Scorer, source: str, limit: int | None = None) -> dict[str, Any]:
    """Score the choice among endings of a context (Zellers et al. 2019); arguments and errors as :func:`lambada`.

    ``acc`` chooses the ending with the largest log-probability, ``acc_norm`` that with the largest per character, which
    doesn't favour short endings.

    The context is ``activity_label: ctx_a Ctx_b``, with ``ctx_b`` capitalised; each ending follows after a space, and
    WikiHow's bracketed markers are removed. If a line has no ``ctx_a`` and ``ctx_b`` (as in TensorFlow Datasets),
    ``ctx`` is used as it is, which differs in that one capital letter and changes the scores slightly. ``source`` is
    ``jsonl:FILE`` with these fields, ``endings`` and ``label``, or ``tfds:hellaswag[:SPLIT]`` (default: validation;
    the test split has no labels).
    """
    examples, pairs = [], []
    for row in read_examples(source, "hellaswag", limit):
        context, endings, label = _hellaswag_example(row)
        with located(row.where):
            pairs.append([scorer.encode(context, f" {ending}") for ending in endings])
        # acc_norm never chooses an empty ending
        examples.append((np.array([len(ending) or 1e-9 for ending in endings]), label))
    logprobs = scorer.score([pair for group in pairs for pair in group])[0]
    by_example = np.split(logprobs, np.cumsum([len(group) for group in pairs])[:-1])
    scored = [(scores, lengths, label) for scores, (lengths, label) in zip(by_example, examples, strict=True)]
    return {
        **_common(source, [any(map(scorer.is_truncated, group)) for group in pairs]),
        **_accuracy("acc", np.array([scores.argmax() == label for scores, _, label in scored])),
        **_accuracy("acc_norm", np.array([(scores / lengths).argmax() == label for scores, lengths, label in scored])),
    }


def _common(source: str, truncated: list[bool]) -> dict[str, Any]:
    return {"source": source, "n_examples": len(truncated), "n_truncated": sum(truncated)}


def _accuracy(name: str, hits: np.ndarray) -> dict[str, float | None]:
    """Return an accuracy and its standard error; None for a single example."""
    acc, n = float(hits.mean()), len(hits)
    return {name: acc, f"{name}_stderr": math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else None}


def read_examples(source: str, benchmark: str, limit: int | None) -> list[Row]:
    """Read the first ``limit`` examples (None: all) of ``lambada`` or ``hellaswag`` from a source of rows."""
    split, renamed = _TFDS[benchmark]
    rows = parse_source(source, split=split).read_rows(limit)
    return [Row(row.where, {renamed.get(name, name): value for name, value in row.fields.items()}) for row in rows]


def _hellaswag_example(row: Row) -> tuple[str, list[str], int]:
    endings = row.field("endings")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e.strip() for e in endings):
        raise InputError(f"{row.where}: endings is {endings!r:.60}; expected a list of at least two texts")
    if "ctx" in row.fields and not {"ctx_a", "ctx_b"} <= row.fields.keys():
        text = row.text("ctx")
    else:
        text = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    context = _without_brackets(f"{row.text('activity_label')}: {text}")
    return context, [_without_brackets(ending) for ending in endings], _label(row, len(endings))


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
