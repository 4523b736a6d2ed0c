"""Labelled texts to batches, in an order that is f(seed, step).

A batch is a dict of ``inputs`` (int32, (batch, width), padded with zeros on the right), ``lengths`` (int32, (batch,),
at least 1), ``labels`` (int32, (batch,)) and ``weights`` (float32, (batch,), 0 for rows that fill the last batch).
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Float32, Int32

from slm_jax.data.windows import Batch, endless_batches
from slm_jax.errors import InputError
from slm_jax.tokenizer import Tokenizer

SHORTEST_WIDTH = 16  # tokens; each width is a program to compile


def encode_text(text: str, tokenizer: Tokenizer) -> Int32[np.ndarray, " tokens"]:
    """Return the token ids of a text; InputError: the tokenizer cannot encode it, or it has no tokens."""
    try:
        ids = tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"text {text!r:.60}: {error}") from None
    if not ids:
        raise InputError(f"text {text!r:.60} has no token; expected at least one")
    return np.array(ids, np.int32)


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Int32[np.ndarray, " tokens"]], int]:
    """Return the token ids of each text, truncated to ``max_length``, and how many texts were truncated."""
    encoded = [encode_text(text, tokenizer) for text in texts]
    return [ids[:max_length] for ids in encoded], sum(ids.size > max_length for ids in encoded)


def bucket_width(longest: int, limit: int) -> int:
    """Return the width of a batch: ``longest`` rounded up to a power of two, at least 16, at most ``limit`` tokens."""
    return min(limit, max(SHORTEST_WIDTH, 1 << (longest - 1).bit_length()))


def classification_batches(
    encoded: Sequence[Int32[np.ndarray, " _"]],
    labels: Int32[np.ndarray, " texts"],
    weights: Float32[np.ndarray, " texts"],
    *,
    batch_size: int,
    limit: int,
    bucketed: bool,
    seed: int,
) -> grain.MapDataset:
    """Return the endless sequence of training batches; element ``i`` is the batch of step ``i``.

    Args:
        encoded: token ids of each text, 1 to ``limit``.
        labels: class of each text.
        weights: weight of each text in the loss.
        batch_size: texts per batch.
        limit: the most tokens of a row.
        bucketed: whether the width of a batch is its longest text, rounded up by `bucket_width`, instead of ``limit``.
        seed: seed of the order, which is new each epoch.
    """
    return endless_batches(
        len(encoded),
        lambda texts: _batch([encoded[i] for i in texts], labels[texts], weights[texts], limit, bucketed),
        batch_size=batch_size,
        seed=seed,
    )


def classification_eval_batches(
    encoded: Sequence[Int32[np.ndarray, " _"]],
    labels: Int32[np.ndarray, " texts"],
    *,
    batch_size: int,
    limit: int,
    bucketed: bool,
) -> Iterator[Batch]:
    """Yield every text once, sorted by length to save padding; rows that fill the last batch have weight 0."""
    order = np.argsort([ids.size for ids in encoded], kind="stable")
    for first in range(0, len(order), batch_size):
        texts = order[first : first + batch_size]
        n_empty = batch_size - len(texts)
        yield _batch(
            [encoded[i] for i in texts] + [np.zeros(1, np.int32)] * n_empty,
            np.pad(labels[texts], (0, n_empty)),
            np.pad(np.ones(len(texts), np.float32), (0, n_empty)),
            limit,
            bucketed,
        )


def _batch(rows: Sequence[np.ndarray], labels: np.ndarray, weights: np.ndarray, limit: int, bucketed: bool) -> Batch:
    lengths = np.array([ids.size for ids in rows], np.int32)
    width = bucket_width(int(lengths.max()), limit) if bucketed else limit
    inputs = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(inputs, rows, strict=True):
        row[: ids.size] = ids
    return {"inputs": inputs, "lengths": lengths, "labels": labels, "weights": weights}
