"""Loss, perplexity and bits per byte of a whole text."""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Integer

from slm_jax.data.corpus import encode_documents, open_tokens, split_documents
from slm_jax.data.sources import check_text_column, parse_source
from slm_jax.data.token_file import TokenSource
from slm_jax.errors import InputError, located
from slm_jax.evaluation.logprobs import Scorer, target_logprobs
from slm_jax.evaluation.results import perplexity
from slm_jax.generation.decode import check_ids
from slm_jax.model import GPTModel


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """The cross-entropy of a text: nats summed over its targets (all tokens but the first), and their number."""

    loss_sum: float
    n_targets: int

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.loss_sum / self.n_targets


@dataclasses.dataclass(frozen=True)
class SourceLoss:
    """The cross-entropy of a source, or of one split of it: ``loss`` in nats per target (all tokens but the first).

    ``n_bytes``, the size of the text in UTF-8, and ``bits_per_byte`` are None for a source of tokens.
    """

    source: str
    split: str
    context_length: int
    stride: int
    n_targets: int
    n_bytes: int | None
    loss: float
    perplexity: float
    bits_per_byte: float | None


def text_loss(
    scorer: Scorer,
    tokens: Integer[np.ndarray, " tokens"],
    *,
    context_length: int | None = None,
    stride: int | None = None,
) -> TextLoss:
    """Measure the loss of a text of any length; each token but the first is a target exactly once.

    A window of ``context_length`` tokens (default: the model's) predicts as many targets, shifted by one; the next
    window starts ``stride`` tokens later (default: ``context_length``), and only its targets that no earlier window
    had count. A small stride gives each target more context (at least ``context_length - stride`` tokens) and costs
    proportionally more. Hugging Face's recipe ("Perplexity of fixed-length models") counts a window's last target
    among its ``max_length`` tokens: it is this one with ``context_length = max_length - 1``.

    Raises:
        InputError: fewer than two tokens, an id outside the vocabulary, a number out of range.
    """
    model, batch_size = scorer.model, scorer.batch_size
    context_length, stride = _window(model, context_length, stride)
    tokens = np.asarray(tokens)
    if tokens.size < 2:
        raise InputError(f"empty text: {tokens.size} tokens; expected at least 2 (the first is not predicted)")
    check_ids(tokens, model.cfg.vocab_size)
    n_targets = tokens.size - 1
    width = min(context_length, n_targets)
    starts = np.arange(0, max(1, n_targets - context_length + stride), stride)
    shape = (min(batch_size, len(starts)), width)
    loss_sum = 0.0
    for first in scorer.track(range(0, len(starts), batch_size)):
        inputs, targets, counts = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, start in enumerate(starts[first : first + batch_size]):
            window = tokens[start : start + width + 1]
            n = window.size - 1
            inputs[i, :n], targets[i, :n] = window[:-1], window[1:]
            counts[i, context_length - stride if start else 0 : n] = True
        logprobs, _ = target_logprobs(model, scorer.params, inputs, targets)
        loss_sum -= float(np.asarray(logprobs)[counts].sum(dtype=np.float64))
    return TextLoss(loss_sum, n_targets)


def evaluate_source(
    scorer: Scorer,
    source: str,
    *,
    text_column: str | None = None,
    split: Literal["all", "train", "validation"] = "all",
    validation_fraction: float = 0.1,
    context_length: int | None = None,
    stride: int | None = None,
) -> SourceLoss:
    """Measure the loss of a source (as for pretraining, such as ``text:GLOB``), or of a split of it.

    Documents are joined with the end-of-text id, and the splits are those that pretraining makes of the same source
    with the same ``validation_fraction``. ``text_column`` is the column of the texts in rows
    (:meth:`slm_jax.data.rows.Source.documents`); see :func:`text_loss` for the other arguments.

    Raises:
        InputError: a source that cannot be read, or doesn't fit the tokenizer or the model.
    """
    assert 0 < validation_fraction < 1, validation_fraction
    context_length, stride = _window(scorer.model, context_length, stride)  # before a long read
    parsed, n_bytes = parse_source(source), None
    check_text_column(text_column, [parsed])
    if isinstance(parsed, TokenSource):
        tokens = open_tokens(parsed, scorer.tokenizer).tokens
        cut = int(len(tokens) * (1 - validation_fraction))
        tokens = {"all": tokens, "train": tokens[:cut], "validation": tokens[cut:]}[split]
    else:
        documents = parsed.read_documents(text_column)
        if split != "all":
            train, validation = split_documents(documents, validation_fraction)
            documents = train if split == "train" else validation
        with located(parsed):
            tokens = encode_documents(documents, scorer.tokenizer)
        n_bytes = sum(len(document.encode()) for document in documents)
    with located(f"{source} (split {split})"):
        measured = text_loss(scorer, tokens, context_length=context_length, stride=stride)
    return SourceLoss(
        source=source,
        split=split,
        context_length=context_length,
        stride=stride,
        n_targets=measured.n_targets,
        n_bytes=n_bytes,
        loss=measured.loss,
        perplexity=perplexity(measured.loss),
        bits_per_byte=None if n_bytes is None else measured.loss_sum / math.log(2) / n_bytes,
    )


def _window(model: GPTModel, context_length: int | None, stride: int | None) -> tuple[int, int]:
    longest = model.cfg.context_length
    context_length = longest if context_length is None else context_length
    if not 1 <= context_length <= longest:
        raise InputError(f"context_length is {context_length}; expected 1 to the model's {longest}")
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise InputError(f"stride is {stride}; expected 1 to the context length of {context_length}")
    return context_length, stride
