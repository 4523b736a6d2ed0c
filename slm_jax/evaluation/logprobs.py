"""The log-probability of tokens under a model, behind every evaluation; loss, perplexity, bits per byte of a text."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Integer

from slm_jax.data.corpus import check_tokenizer, encode_documents, split_documents
from slm_jax.data.sources import check_text_column, parse_source
from slm_jax.data.token_file import TokenSource, open_token_file
from slm_jax.errors import InputError, located
from slm_jax.generation.decode import check_ids, round_up
from slm_jax.model import GPTModel, Params
from slm_jax.nn.sharding import on_mesh_of
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
        as one text and split after the context's own tokens. A context begins as the model expects a text to begin; an
        empty one is the end-of-text id.
        """
        stripped = context.rstrip()
        context_ids = self.tokenizer.encode(stripped) if stripped else []
        continuation_ids = self.tokenizer.encode(context + continuation)[len(context_ids) :]
        if not continuation_ids:
            raise InputError(f"the tokenizer makes no token of {continuation!r:.60}; expected text that it encodes")
        return [*self.tokenizer.start_ids, *context_ids] or [self.tokenizer.eot_id], continuation_ids

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
            where = f"the log-probability of pair {np.argmin(np.isfinite(logprobs))}"
            raise InputError(f"{where} is not finite: the weights are damaged, or overflow {self.model.cfg.dtype}")
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
            with on_mesh_of(self.params):
                scores, hits = map(np.asarray, target_logprobs(self.model, self.params, inputs, targets))
            for i, (text, ids, n_scored) in enumerate(batch):
                scored = slice(len(ids) - 1 - n_scored, len(ids) - 1)
                logprobs[text] += scores[i, scored].sum(dtype=np.float64)
                is_greedy[text] &= hits[i, scored].all()
        return logprobs, is_greedy


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
        file = open_token_file(parsed.name)
        check_tokenizer(parsed, file, scorer.tokenizer)
        cut = int(len(file.tokens) * (1 - validation_fraction))
        tokens = file.tokens[{"all": slice(None), "train": slice(cut), "validation": slice(cut, None)}[split]]
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
