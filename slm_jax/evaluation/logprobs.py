"""The log-probability of given tokens under a model: the one computation behind every evaluation."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from slm_jax.errors import InputError
from slm_jax.generation.decode import round_up
from slm_jax.model import GPTModel, Params
from slm_jax.tokenizer import Tokenizer

Pair = tuple[Sequence[int], Sequence[int]]
Track = Callable[[Sequence[Any]], Iterable[Any]]  # yields the batches, such as rich.progress.track

SHORTEST_BUCKET = 16  # tokens; below, compiling another program costs more than padding


@functools.partial(jax.jit, static_argnames="model")
def target_logprobs(
    model: GPTModel, params: Params, inputs: Int[Array, "batch seq"], targets: Int[Array, "batch seq"]
) -> tuple[Float32[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """Compute the log-probability (nats) of each target after its input, and whether it is the argmax."""
    hidden = model.apply({"params": params}, inputs, method="hidden")

    def score(row: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = row
        logits = model.apply({"params": params}, hidden[None], method="logits")[0]
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets

    return jax.lax.map(score, (hidden, targets))  # row by row: the logits of a whole batch could fill the memory


def continuation_logprobs(
    model: GPTModel, params: Params, pairs: Sequence[Pair], batch_size: int = 8, track: Track = iter
) -> tuple[Float[np.ndarray, " pairs"], Bool[np.ndarray, " pairs"]]:
    """Score continuations of contexts, as EleutherAI's lm-evaluation-harness does (its ``loglikelihood``).

    A pair that is too long is truncated on the left: the model sees ``context_length`` tokens, and the continuation's
    last token is only a target. A continuation that is itself longer than the context (an error in the harness) is
    scored in pieces of ``context_length``, each after as much as fits before it.

    Args:
        model: the model.
        params: its parameters.
        pairs: (context ids, continuation ids), neither empty.
        batch_size: pairs per batch.
        track: wraps the list of batches, to show progress.

    Returns:
        (logprobs, is_greedy), in the order of the pairs: the summed log-probability of each continuation in nats, and
        whether each of its tokens is the argmax.

    Raises:
        InputError: an id outside the vocabulary; a model that gives NaN.
    """
    assert batch_size >= 1, batch_size
    logprobs, is_greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    for width, batch in track(list(_batches(model, pairs, batch_size))):
        inputs, targets = np.zeros((2, batch_size, width), np.int32)
        for i, row in enumerate(batch):
            inputs[i, : len(row.ids) - 1], targets[i, : len(row.ids) - 1] = row.ids[:-1], row.ids[1:]
        scores, hits = map(np.asarray, target_logprobs(model, params, inputs, targets))
        for i, row in enumerate(batch):
            scored = slice(len(row.ids) - 1 - row.n_scored, len(row.ids) - 1)
            logprobs[row.pair] += scores[i, scored].sum(dtype=np.float64)
            is_greedy[row.pair] &= hits[i, scored].all()
    if not np.isfinite(logprobs).all():  # the argmax of NaNs would be the first
        raise InputError(
            f"the log-probability of pair {np.argmin(np.isfinite(logprobs))} is not finite: the weights are damaged or "
            f"overflow {model.cfg.dtype}; use float32 or an earlier checkpoint"
        )
    return logprobs, is_greedy


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Encode a context and its continuation as the lm-evaluation-harness does.

    White space at the end of the context moves to the continuation, where a token begins with it; both are encoded as
    one text and split after the context's own tokens. An empty context becomes the end-of-text id.

    Raises:
        InputError: the tokenizer makes no token of the continuation.
    """
    stripped = context.rstrip()
    context_ids = tokenizer.encode(stripped) if stripped else []
    continuation_ids = tokenizer.encode(context + continuation)[len(context_ids) :]
    if not continuation_ids:
        raise InputError(f"the tokenizer makes no token of {continuation!r:.60}; expected text that it encodes")
    return context_ids or [tokenizer.eot_id], continuation_ids


def is_truncated(model: GPTModel, pair: Pair) -> bool:
    """Whether a pair is longer than the model's context."""
    return len(pair[0]) + len(pair[1]) > model.cfg.context_length + 1


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raise InputError for an id outside the vocabulary, which JAX would silently clamp."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        where = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise InputError(
            f"token {where} has id {ids[where]}, outside the model's vocabulary of {vocab_size}; was it encoded with "
            "another tokenizer?"
        )


class _Row(NamedTuple):
    """At most ``context_length + 1`` ids of a pair; the last ``n_scored`` are scored."""

    pair: int
    ids: np.ndarray
    n_scored: int


def _batches(model: GPTModel, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[int, list[_Row]]]:
    """Yield (width, rows): batches of rows of about the same length, the longest first."""
    rows = sorted(_rows(model, pairs), key=lambda row: len(row.ids), reverse=True)
    context = model.cfg.context_length
    for width, group in itertools.groupby(rows, lambda row: round_up(len(row.ids) - 1, SHORTEST_BUCKET, context)):
        bucket = list(group)
        yield from ((width, bucket[first : first + batch_size]) for first in range(0, len(bucket), batch_size))


def _rows(model: GPTModel, pairs: Sequence[Pair]) -> Iterable[_Row]:
    context_length = model.cfg.context_length
    for i, (context, continuation) in enumerate(pairs):
        assert len(context), f"pair {i} has no context"
        assert len(continuation), f"pair {i} has no continuation"
        ids = np.array([*context, *continuation], np.int64)
        check_ids(ids, model.cfg.vocab_size)
        for start in range(len(context), len(ids), context_length):
            piece = ids[: start + context_length][-context_length - 1 :]
            yield _Row(i, piece, min(context_length, len(ids) - start))
