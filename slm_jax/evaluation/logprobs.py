"""The log-probability of given tokens under a model: the one computation behind every evaluation."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from slm_jax.errors import InputError
from slm_jax.generation.decode import check_ids, round_up
from slm_jax.model import GPTModel, Params
from slm_jax.tokenizer import Tokenizer

Pair = tuple[Sequence[int], Sequence[int]]
Track = Callable[[Sequence[Any]], Iterable[Any]]  # yields the batches, such as rich.progress.track

_Row = tuple[int, np.ndarray, int]  # pair, at most context_length + 1 of its ids, how many of the last are scored

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


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model that is evaluated.

    Attributes:
        model: the model.
        params: its parameters.
        tokenizer: its tokenizer.
        batch_size: sequences per batch.
        track: wraps the list of batches, to show progress.
    """

    model: GPTModel
    params: Params
    tokenizer: Tokenizer
    batch_size: int = 8
    track: Track = iter

    def encode(self, context: str, continuation: str) -> Pair:
        """Encode a context and its continuation as the lm-evaluation-harness does.

        White space at the end of the context moves to the continuation, where a token begins with it; both are encoded
        as one text and split after the context's own tokens. An empty context becomes the end-of-text id.

        Raises:
            InputError: the tokenizer makes no token of the continuation.
        """
        stripped = context.rstrip()
        context_ids = self.tokenizer.encode(stripped) if stripped else []
        continuation_ids = self.tokenizer.encode(context + continuation)[len(context_ids) :]
        if not continuation_ids:
            raise InputError(f"the tokenizer makes no token of {continuation!r:.60}; expected text that it encodes")
        return context_ids or [self.tokenizer.eot_id], continuation_ids

    def is_truncated(self, pair: Pair) -> bool:
        """Whether a pair is longer than the model's context."""
        return len(pair[0]) + len(pair[1]) > self.model.cfg.context_length + 1

    def score(self, pairs: Sequence[Pair]) -> tuple[Float[np.ndarray, " pairs"], Bool[np.ndarray, " pairs"]]:
        """Score continuations of contexts, as EleutherAI's lm-evaluation-harness does (its ``loglikelihood``).

        A pair that is too long is truncated on the left: the model sees ``context_length`` tokens, and the
        continuation's last token is only a target. A continuation that is itself longer than the context (an error in
        the harness) is scored in pieces of ``context_length``, each after as much as fits before it.

        Args:
            pairs: (context ids, continuation ids), neither empty.

        Returns:
            (logprobs, is_greedy), in the order of the pairs: the summed log-probability of each continuation in nats,
            and whether each of its tokens is the argmax.

        Raises:
            InputError: an id outside the vocabulary; a model that gives NaN.
        """
        logprobs, is_greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        for width, batch in self.track(list(self._batches(pairs))):
            inputs, targets = np.zeros((2, self.batch_size, width), np.int32)
            for i, (_, ids, _) in enumerate(batch):
                inputs[i, : len(ids) - 1], targets[i, : len(ids) - 1] = ids[:-1], ids[1:]
            scores, hits = map(np.asarray, target_logprobs(self.model, self.params, inputs, targets))
            for i, (pair, ids, n_scored) in enumerate(batch):
                scored = slice(len(ids) - 1 - n_scored, len(ids) - 1)
                logprobs[pair] += scores[i, scored].sum(dtype=np.float64)
                is_greedy[pair] &= hits[i, scored].all()
        if not np.isfinite(logprobs).all():  # the argmax of NaNs would be the first
            raise InputError(
                f"the log-probability of pair {np.argmin(np.isfinite(logprobs))} is not finite: the weights are "
                f"damaged or overflow {self.model.cfg.dtype}; use float32 or an earlier checkpoint"
            )
        return logprobs, is_greedy

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[_Row]]]:
        """Yield (width, rows): batches of rows of about the same length, the longest first."""
        context_length, rows = self.model.cfg.context_length, []
        for i, (context, continuation) in enumerate(pairs):
            ids = np.array([*context, *continuation], np.int64)
            check_ids(ids, self.model.cfg.vocab_size)
            for start in range(len(context), len(ids), context_length):
                piece = ids[: start + context_length][-context_length - 1 :]
                rows.append((i, piece, min(context_length, len(ids) - start)))
        rows.sort(key=lambda row: len(row[1]), reverse=True)
        by_width = itertools.groupby(rows, lambda row: round_up(len(row[1]) - 1, SHORTEST_BUCKET, context_length))
        for width, group in by_width:
            while batch := list(itertools.islice(group, self.batch_size)):
                yield width, batch
