"""The log-probability of given tokens under a model: the one computation behind every evaluation."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
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

Row = tuple[int, np.ndarray, int]  # text that it belongs to, its ids, how many of the last are scored

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


def perplexity(loss: float) -> float:
    """Return exp(loss) of a loss in nats; infinity if it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model that is evaluated, ``batch_size`` sequences at a time; ``track`` wraps the batches, to show progress."""

    model: GPTModel
    params: Params
    tokenizer: Tokenizer
    batch_size: int = 8
    track: Track = iter

    def encode(self, context: str, continuation: str) -> Pair:
        """Encode a context and its continuation as the lm-evaluation-harness does.

        White space at the end of the context moves to the continuation, where a token begins with it; both are encoded
        as one text and split after the context's own tokens. An empty context becomes the end-of-text id.
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

        Returns:
            For each pair, the summed log-probability of the continuation in nats, and whether each of its tokens is
            the argmax.
        """
        context_length, rows = self.model.cfg.context_length, []
        for i, (context, continuation) in enumerate(pairs):
            ids = np.array([*context, *continuation], np.int64)
            check_ids(ids, self.model.cfg.vocab_size)
            for start in range(len(context), len(ids), context_length):
                piece = ids[: start + context_length][-context_length - 1 :]
                rows.append((i, piece, min(context_length, len(ids) - start)))
        logprobs, is_greedy = self.score_rows(rows, len(pairs))
        if not np.isfinite(logprobs).all():  # the argmax of NaNs would be the first
            raise InputError(
                f"the log-probability of pair {np.argmin(np.isfinite(logprobs))} is not finite: the weights are "
                f"damaged or overflow {self.model.cfg.dtype}; use float32 or an earlier checkpoint"
            )
        return logprobs, is_greedy

    def score_rows(
        self, rows: Iterable[Row], n_texts: int, width: int | None = None
    ) -> tuple[Float[np.ndarray, " texts"], Bool[np.ndarray, " texts"]]:
        """Sum the log-probabilities of each text's rows, and tell whether each scored token is the argmax.

        Rows have at most ``context_length + 1`` ids. They are padded to ``width`` inputs; None: to few widths, so that
        rows of similar length share a batch.
        """
        longest = self.model.cfg.context_length
        rows = sorted(rows, key=lambda row: len(row[1]), reverse=True)
        by_width = itertools.groupby(rows, lambda row: width or round_up(len(row[1]) - 1, SHORTEST_BUCKET, longest))
        batches: list[tuple[int, list[Row]]] = []
        for n_inputs, group in by_width:
            while batch := list(itertools.islice(group, self.batch_size)):
                batches.append((n_inputs, batch))
        logprobs, is_greedy = np.zeros(n_texts), np.ones(n_texts, bool)
        for n_inputs, batch in self.track(batches):
            inputs, targets = np.zeros((2, min(self.batch_size, len(rows)), n_inputs), np.int32)
            for i, (_, ids, _) in enumerate(batch):
                inputs[i, : len(ids) - 1], targets[i, : len(ids) - 1] = ids[:-1], ids[1:]
            scores, hits = map(np.asarray, target_logprobs(self.model, self.params, inputs, targets))
            for i, (text, ids, n_scored) in enumerate(batch):
                scored = slice(len(ids) - 1 - n_scored, len(ids) - 1)
                logprobs[text] += scores[i, scored].sum(dtype=np.float64)
                is_greedy[text] &= hits[i, scored].all()
        return logprobs, is_greedy
