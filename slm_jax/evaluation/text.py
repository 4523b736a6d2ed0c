"""Loss, perplexity and bits per byte of a whole text."""

import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer

from slm_jax.data.corpus import encode_documents, open_tokens, split_documents
from slm_jax.data.sources import check_text_column, parse_source
from slm_jax.data.token_file import TokenSource
from slm_jax.errors import InputError, located
from slm_jax.evaluation.logprobs import Scorer, perplexity
from slm_jax.generation.decode import check_ids
from slm_jax.model import GPTModel


def text_loss(
    scorer: Scorer,
    tokens: Integer[np.ndarray, " tokens"],
    *,
    context_length: int | None = None,
    stride: int | None = None,
) -> float:
    """Return the cross-entropy of a text of any length: nats, summed over all tokens but the first, each once.

    A window of ``context_length`` tokens (default: the model's) predicts as many targets, shifted by one; the next
    window starts ``stride`` tokens later (default: ``context_length``), and only its targets that no earlier window
    had count. A small stride gives each target more context (at least ``context_length - stride`` tokens) and costs
    proportionally more. Hugging Face's recipe ("Perplexity of fixed-length models") counts a window's last target
    among its ``max_length`` tokens: it is this one with ``context_length = max_length - 1``.
    """
    context_length, stride = _window(scorer.model, context_length, stride)
    tokens = np.asarray(tokens)
    if tokens.size < 2:
        raise InputError(f"empty text: {tokens.size} tokens; expected at least 2 (the first is not predicted)")
    check_ids(tokens, scorer.model.cfg.vocab_size)
    n_targets, rows = tokens.size - 1, []
    for start in range(0, max(1, n_targets - context_length + stride), stride):
        window = tokens[start : start + context_length + 1]
        rows.append((0, window, window.size - 1 - (context_length - stride if start else 0)))
    logprobs, _ = scorer.score_rows(rows, 1, width=min(context_length, n_targets))
    return -float(logprobs[0])


def evaluate_source(
    scorer: Scorer,
    source: str,
    *,
    text_column: str | None = None,
    split: Literal["all", "train", "validation"] = "all",
    validation_fraction: float = 0.1,
    context_length: int | None = None,
    stride: int | None = None,
) -> dict[str, Any]:
    """Measure the loss of a source (as for pretraining, such as ``text:GLOB``), or of a split of it.

    Documents are joined with the end-of-text id, and the splits are those that pretraining makes of the same source
    with the same ``validation_fraction``. ``text_column`` is the column of the texts in rows
    (:meth:`slm_jax.data.rows.Source.documents`); see :func:`text_loss` for the other arguments.

    Returns:
        The figures: ``loss`` in nats per target (all tokens but the first), ``perplexity``, and for a text also
        ``n_bytes``, its size in UTF-8, and ``bits_per_byte``; for a source of tokens these two are None.
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
        loss_sum = text_loss(scorer, tokens, context_length=context_length, stride=stride)
    loss = loss_sum / (tokens.size - 1)
    return {
        "source": source,
        "split": split,
        "context_length": context_length,
        "stride": stride,
        "n_targets": tokens.size - 1,
        "n_bytes": n_bytes,
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": None if n_bytes is None else loss_sum / math.log(2) / n_bytes,
    }


def _window(model: GPTModel, context_length: int | None, stride: int | None) -> tuple[int, int]:
    longest = model.cfg.context_length
    context_length = longest if context_length is None else context_length
    if not 1 <= context_length <= longest:
        raise InputError(f"context_length is {context_length}; expected 1 to the model's {longest}")
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise InputError(f"stride is {stride}; expected 1 to the context length of {context_length}")
    return context_length, stride
