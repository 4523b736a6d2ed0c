"""Conversations to batches: which tokens are learned, several examples in a row, and an order that is f(seed, step).

A batch has ``inputs`` and ``targets`` (int32, (batch, width)) and ``weights`` (float32, 1 where a target counts);
where examples share rows ``segment_ids`` (int32, 1, 2, … and 0 for padding) and ``positions`` (int32, from 0 for each
example), too. Padding is on the right and never a target.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import grain
import numpy as np
from jaxtyping import Bool, Int32

from slm_jax.data.instructions import Example
from slm_jax.data.templates import Template
from slm_jax.data.text_batches import bucket_width
from slm_jax.data.windows import Batch
from slm_jax.errors import InputError
from slm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One example as tokens.

    Attributes:
        ids: the whole conversation and the end of the text; all but the last are inputs, all but the first targets.
        counts: whether a token is learned; the first, which nothing comes before, is not.
    """

    ids: Int32[np.ndarray, " tokens"]
    counts: Bool[np.ndarray, " tokens"]

    @property
    def n_inputs(self) -> int:
        """The positions that it takes."""
        return len(self.ids) - 1


TooLong = Literal["drop", "truncate"]
Row = list[Tokens]  # the examples that share a row


# Encoding


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    template: Template,
    *,
    mask_prompt: bool,
    max_length: int,
    too_long: TooLong,
) -> tuple[list[Tokens], tuple[str, ...]]:
    """Turn examples into tokens, each piece of the template by itself, as generation will see the prompt.

    The end-of-text token comes last, once, and is learned.

    Args:
        examples: at least one.
        tokenizer: the model's.
        template: how the turns become one text.
        mask_prompt: whether only responses are learned.
        max_length: tokens that may go in, so that an example may have one more.
        too_long: ``drop`` leaves out what is longer; ``truncate`` cuts tokens off the front, never any of the last
            response: an example is left out if that and one token before it do not fit.

    Returns:
        The examples that are left, and a line for each thing that was done to others.

    Raises:
        InputError: a text that the tokenizer cannot encode; no example that is left.
    """
    encoded, n_dropped, n_cut, n_tokens_cut = [], 0, 0, 0
    for example in examples:
        tokens, n_response = _encode(example, tokenizer, template, mask_prompt)
        excess = tokens.n_inputs - max_length
        if excess > 0 and (too_long == "drop" or n_response > max_length):
            n_dropped += 1
            continue
        if excess > 0:
            tokens = _without_front(tokens, excess)
            n_cut, n_tokens_cut = n_cut + 1, n_tokens_cut + excess
        encoded.append(tokens)
    total = f"{len(examples):,} example{'' if len(examples) == 1 else 's'}"
    longer = f"{'the response alone is' if too_long == 'truncate' else 'they are'} longer than {max_length} tokens"
    if not encoded:
        truncate = ", instruction.too_long truncate," if too_long == "drop" else ""
        raise InputError(
            f"nothing to learn from: {total}, and {longer}; expected shorter ones, a greater "
            f"instruction.max_length{truncate} or a model with a larger context"
        )
    notes = []
    if n_dropped:
        notes.append(f"left out {n_dropped:,} of {total}: {longer}")
    if n_cut:
        notes.append(f"cut {n_tokens_cut:,} tokens off the front of {n_cut:,} of {total}: {max_length} may go in")
    return encoded, tuple(notes)


def _encode(example: Example, tokenizer: Tokenizer, template: Template, mask_prompt: bool) -> tuple[Tokens, int]:
    """Return an example's tokens, and how many of them are the last response with the end of the text."""
    ids: list[int] = []
    counts: list[bool] = []
    n_piece = 0
    for text, is_response in template.pieces(example.messages):
        try:
            piece = tokenizer.encode(text)
        except InputError as error:
            raise InputError(f"{example.where}: {error}") from None
        ids += piece
        counts += [is_response or not mask_prompt] * len(piece)
        n_piece = len(piece)
    ids.append(tokenizer.eot_id)
    counts.append(True)
    counts[0] = False
    return Tokens(np.array(ids, np.int32), np.array(counts)), n_piece + 1


def _without_front(tokens: Tokens, n: int) -> Tokens:
    counts = tokens.counts[n:].copy()
    counts[0] = False
    return Tokens(tokens.ids[n:], counts)


# Packing


def pack(tokens: Sequence[Tokens], width: int, seed: int) -> list[Row]:
    """Put examples together in rows of at most ``width`` inputs: each, in a random order, in the first that has room.

    Raises:
        InputError: an example that is longer than a row.
    """
    room = np.full(len(tokens), width)
    rows: list[Row] = []
    for i in np.random.default_rng(seed).permutation(len(tokens)):
        example = tokens[i]
        if example.n_inputs > width:
            raise InputError(f"an example of {example.n_inputs} tokens does not fit in a row of {width}; leave it out")
        row = int(np.argmax(room >= example.n_inputs))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        room[row] -= example.n_inputs
    return rows


# Batches


def instruction_batches(
    rows: Sequence[Row], *, batch_size: int, limit: int, bucketed: bool, packed: bool, seed: int
) -> grain.MapDataset:
    """Return the endless sequence of training batches; element ``i`` is the batch of step ``i``.

    Args:
        rows: the examples of each, one or what :func:`pack` put together.
        batch_size: rows of a batch. Batches go on across the end of an epoch, so no row is left out.
        limit: the most that a batch may be wide.
        bucketed: whether a batch is only as wide as its longest row, rounded up by `bucket_width`; or else ``limit``.
        packed: whether rows may have several examples, so that batches say with ``segment_ids`` and ``positions``
            where they are.
        seed: of the order, which is new each epoch.
    """
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    return order.map(lambda indices: _batch([rows[int(i)] for i in indices], batch_size, limit, bucketed, packed))


def instruction_eval_batches(
    rows: Sequence[Row], *, batch_size: int, limit: int, bucketed: bool, packed: bool
) -> Iterator[Batch]:
    """Yield every row once, sorted by length to save padding; what fills the last batch has weight 0.

    Arguments as for :func:`instruction_batches`.
    """
    ordered = sorted(rows, key=_row_length)
    for first in range(0, len(ordered), batch_size):
        yield _batch(ordered[first : first + batch_size], batch_size, limit, bucketed, packed)


def _batch(rows: Sequence[Row], batch_size: int, limit: int, bucketed: bool, packed: bool) -> Batch:
    width = bucket_width(max(map(_row_length, rows)), limit) if bucketed else limit
    names = ("inputs", "targets", "segment_ids", "positions") if packed else ("inputs", "targets")
    batch = {name: np.zeros((batch_size, width), np.int32) for name in names}
    batch["weights"] = np.zeros((batch_size, width), np.float32)
    for r, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            at = np.s_[r, start : start + example.n_inputs]
            batch["inputs"][at] = example.ids[:-1]
            batch["targets"][at] = example.ids[1:]
            batch["weights"][at] = example.counts[1:]
            if packed:
                batch["segment_ids"][at] = segment
                batch["positions"][at] = np.arange(example.n_inputs)
            start += example.n_inputs
    return batch


def _row_length(row: Row) -> int:
    return sum(example.n_inputs for example in row)
