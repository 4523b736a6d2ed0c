"""Conversations to batches, in an order that is f(seed, step).

A batch has ``inputs`` and ``targets`` (int32, (batch, width)) and ``weights`` (float32, 1 where a target counts, else
0); where examples share rows, also ``segment_ids`` (int32, 1, 2, … and 0 for padding) and ``positions`` (int32, from 0
for each example). Padding is on the right and never a target.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import grain
import numpy as np
from jaxtyping import Bool, Int32
from numpy.typing import ArrayLike

from slm_jax.data.instructions import Example
from slm_jax.data.templates import Template
from slm_jax.data.text_batches import bucket_width
from slm_jax.data.windows import Batch, endless_batches
from slm_jax.errors import InputError
from slm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One example as tokens.

    Attributes:
        ids: the whole conversation and the end-of-text id; all but the last are inputs, all but the first targets.
        counts: whether a token counts in the loss; the first one never does.
    """

    ids: Int32[np.ndarray, " tokens"]
    counts: Bool[np.ndarray, " tokens"]

    @property
    def n_inputs(self) -> int:
        """Number of positions in a row."""
        return len(self.ids) - 1


Row = list[Tokens]  # the examples that share a row


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    template: Template,
    *,
    mask_prompt: bool,
    max_length: int,
    too_long: Literal["drop", "truncate"],
) -> tuple[list[Tokens], tuple[str, ...]]:
    """Turn examples into tokens, each piece of the template by itself, as generation will see the prompt.

    The end-of-text token comes last, once, and counts in the loss; a prompt counts unless ``mask_prompt``. ``drop``
    leaves out examples of more than ``max_length`` inputs; ``truncate`` cuts tokens off the front, but never from the
    last response: an example is left out if that and one token before it don't fit.

    Returns:
        The remaining examples, and notes on those that were dropped or truncated.

    Raises:
        InputError: a text that the tokenizer cannot encode; no remaining example.
    """
    encoded, n_dropped, n_cut, n_tokens_cut = [], 0, 0, 0
    for example in examples:
        tokens, n_response = _encode(example, tokenizer, template, mask_prompt)
        excess = tokens.n_inputs - max_length
        if excess > 0 and (too_long == "drop" or n_response > max_length):
            n_dropped += 1
            continue
        if excess > 0:
            tokens = _tokens(tokens.ids[excess:], tokens.counts[excess:])
            n_cut, n_tokens_cut = n_cut + 1, n_tokens_cut + excess
        encoded.append(tokens)
    total = f"{len(examples):,} example{'' if len(examples) == 1 else 's'}"
    longer = f"{'the response alone is' if too_long == 'truncate' else 'they are'} longer than {max_length} tokens"
    if not encoded:
        raise InputError(
            f"nothing to learn from: {total}, and {longer}; expected shorter ones, or a larger instruction.max_length "
            "and model.context_length"
        )
    notes = []
    if n_dropped:
        notes.append(f"left out {n_dropped:,} of {total}: {longer}")
    if n_cut:
        notes.append(f"truncated {n_cut:,} of {total} to {max_length} tokens: cut {n_tokens_cut:,} off the front")
    return encoded, tuple(notes)


def _encode(example: Example, tokenizer: Tokenizer, template: Template, mask_prompt: bool) -> tuple[Tokens, int]:
    """Return an example's tokens, and how many of them are the last response with the end-of-text token."""
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
    return _tokens([*ids, tokenizer.eot_id], [*counts, True]), n_piece + 1


def _tokens(ids: ArrayLike, counts: ArrayLike) -> Tokens:
    return Tokens(np.array(ids, np.int32), np.array(counts) & (np.arange(np.size(counts)) > 0))


def pack(tokens: Sequence[Tokens], width: int, seed: int) -> list[Row]:
    """Put examples in rows of at most ``width`` inputs: each, in a random order, in the first that has room."""
    room = np.full(len(tokens), width)
    rows: list[Row] = []
    for i in np.random.default_rng(seed).permutation(len(tokens)):
        example = tokens[i]
        assert example.n_inputs <= width, "an example doesn't fit in a row"
        row = int(np.argmax(room >= example.n_inputs))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        room[row] -= example.n_inputs
    return rows


def instruction_batches(
    rows: Sequence[Row], *, batch_size: int, limit: int, bucketed: bool, packed: bool, seed: int
) -> grain.MapDataset:
    """Return the endless sequence of training batches; element ``i`` is the batch of step ``i``.

    Args:
        rows: the examples of each row: one, or those that :func:`pack` put together.
        batch_size: rows per batch.
        limit: the most tokens of a row.
        bucketed: whether the width of a batch is its longest row, rounded up by `bucket_width`, instead of ``limit``.
        packed: whether rows may have several examples, so that batches have ``segment_ids`` and ``positions``.
        seed: seed of the order, which is new each epoch.
    """
    return endless_batches(
        len(rows),
        lambda indices: _batch([rows[int(i)] for i in indices], batch_size, limit, bucketed, packed),
        batch_size=batch_size,
        seed=seed,
    )


def instruction_eval_batches(
    rows: Sequence[Row], *, batch_size: int, limit: int, bucketed: bool, packed: bool
) -> Iterator[Batch]:
    """Yield every row once, sorted by length to save padding; padding of the last batch has weight 0."""
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
