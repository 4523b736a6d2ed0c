"""From token arrays to batches, as a function of (seed, step): windows at strides or random offsets, or packed rows.

A batch is a dict of ``inputs`` and ``targets`` (int32, (batch, context); targets are shifted by one token) and
``weights`` (float32, 1 where a target counts, else 0). Padding is on the right. Batches of packed rows, in which each
document sees only itself, also have ``segment_ids`` (int32, 1, 2, … for the pieces of a row, 0 for padding) and
``positions`` (int32, from 0 in each piece).

For packing, tokens are cut right before every end-of-text id, so that a piece is ``[eot, t1 … tn]`` with the targets
``[t1 … tn, eot]``: every token except the first is a target once, and the start of a document is learned after the same
id from which generation starts. Pieces longer than a row are cut again.
"""

import dataclasses
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Int32, Int64

from slm_jax.data.ids import Ids, as_ids
from slm_jax.errors import InputError

Batch = dict[str, np.ndarray]
Rows = np.ndarray | slice
ALL_ROWS = slice(None)
MakeBatch = Callable[[np.ndarray, Rows], Batch]  # takes the indices of items, and which rows to make

SHORTEST_WIDTH = 16  # tokens; each width needs a compiled program
_CHUNK = 1 << 22  # tokens searched at a time, so that a memory-mapped file stays out of memory


class TrainBatches(grain.MapDataset):
    """The endless sequence of batches; element ``i`` is the batch of step ``i``."""

    def __init__(
        self,
        order: grain.MapDataset,
        make: MakeBatch,
        batch_size: int,
        *,
        whole: bool = False,
        rows: np.ndarray | None = None,
    ):
        """``order``: indices of items. ``whole``: rows depend on all items of a batch, such as on the longest."""
        super().__init__(order)
        self._make, self._batch_size, self._whole = make, batch_size, whole
        self._rows = np.arange(batch_size) if rows is None else rows

    def of_rows(self, rows: np.ndarray) -> "TrainBatches":
        """Return the batches with only these rows, such as those of one host; the others are not made."""
        return TrainBatches(self.parents[0], self._make, self._batch_size, whole=self._whole, rows=rows)

    def __len__(self) -> int:
        return len(self.parents[0]) // self._batch_size

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return self.slice(step)
        first = step * self._batch_size
        if not self._whole:
            return self._make(self._items(first + self._rows), ALL_ROWS)
        return self._make(self._items(first + np.arange(self._batch_size)), self._rows)

    def _items(self, at: np.ndarray) -> np.ndarray:
        return np.array([self.parents[0][i] for i in at.tolist()], np.int64)


def endless_batches(
    n: int, make: MakeBatch, *, batch_size: int, seed: int, shuffle: bool = True, whole: bool = False
) -> TrainBatches:
    """Return the endless sequence of batches of ``n`` items; element ``i`` is the batch of step ``i``.

    With ``shuffle`` each epoch has its own random order. Batches continue across the end of an epoch, so no item is
    left out. ``whole``: see :class:`TrainBatches`.
    """
    order = grain.MapDataset.range(n).seed(seed)
    order = (order.shuffle() if shuffle else order).repeat()
    return TrainBatches(order, make, batch_size, whole=whole)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Batches of the items of ``order``, each once; the last batch is filled up with rows of zeros with weight 0.

    ``rows``: rows of each batch to make (ascending); rows from ``batch_size`` on are empty; None: all rows.
    """

    order: np.ndarray
    make: MakeBatch
    batch_size: int
    rows: np.ndarray | None = None

    def of_rows(self, rows: np.ndarray) -> "EvalBatches":
        """Return the batches with only these rows, such as those of one host; the others are not made."""
        return dataclasses.replace(self, rows=rows)

    def __iter__(self) -> Iterator[Batch]:
        rows = np.arange(self.batch_size) if self.rows is None else self.rows
        for first in range(0, len(self.order), self.batch_size):
            items = self.order[first : first + self.batch_size]
            yield fill_up(self.make(items, rows[rows < len(items)]), len(rows))


def fill_up(batch: Batch, rows: int) -> Batch:
    """Append rows of zeros (weight 0) to a batch, up to ``rows`` rows."""
    missing = rows - len(next(iter(batch.values())))
    if not missing:
        return batch
    return {name: np.pad(value, [(0, missing), *[(0, 0)] * (value.ndim - 1)]) for name, value in batch.items()}


def bucket_width(longest: int, limit: int) -> int:
    """Return the width of a batch: ``longest`` rounded up to a power of two, at least 16, at most ``limit`` tokens."""
    return min(limit, max(SHORTEST_WIDTH, 1 << (longest - 1).bit_length()))


def check_window(n_tokens: int, context_length: int, split: str) -> None:
    """Raise InputError if a split has less than one window (training) or one target (validation)."""
    needed = context_length + 1 if split == "training" else 2
    if n_tokens < needed:
        remedy = "use a longer text or a smaller model.context_length"
        raise InputError(f"the {split} split has {n_tokens} tokens, fewer than one window of {needed}; {remedy}")


# Windows


def train_batches(
    tokens: Ids,
    *,
    context_length: int,
    batch_size: int,
    sampling: str,
    stride: int | None,
    shuffle: bool,
    seed: int,
) -> TrainBatches:
    """Return the endless sequence of training batches; element ``i`` is the batch of step ``i``.

    ``sampling`` is ``stride``, for windows every ``stride`` tokens (None: ``context_length``), with ``shuffle`` in a
    new random order each epoch; or ``random``, for nanoGPT's random offsets. InputError: fewer tokens than one window.
    """
    check_window(tokens.size, context_length, "training")
    if sampling == "random":
        n_offsets = tokens.size - context_length
        starts = grain.MapDataset.range(1).seed(seed).repeat().random_map(lambda _, rng: int(rng.integers(n_offsets)))
        return TrainBatches(starts, lambda at, rows: _windows(tokens, at[rows], context_length), batch_size)
    strided = window_starts(tokens.size, context_length, stride)
    return endless_batches(
        len(strided),
        lambda windows, rows: _windows(tokens, strided[windows[rows]], context_length),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
    )


def steps_per_epoch(n_tokens: int, *, context_length: int, batch_size: int, sampling: str, stride: int | None) -> float:
    """Return how many batches cover the windows once (``sampling`` stride), or as many tokens as there are (random)."""
    if sampling == "stride":
        return len(window_starts(n_tokens, context_length, stride)) / batch_size
    return (n_tokens - 1) / (context_length * batch_size)


def window_starts(n_tokens: int, context_length: int, stride: int | None) -> np.ndarray:
    """Return the starts of the windows of a strided pass, each followed by one more token for the last target."""
    return np.arange(0, n_tokens - context_length, stride or context_length)


def validation_batches(tokens: Ids, *, context_length: int, batch_size: int) -> EvalBatches:
    """Return all ``tokens`` in windows that don't overlap, so that every token but the first is a target once."""
    starts = np.arange(0, tokens.size - 1, context_length)
    return EvalBatches(starts, lambda at, rows: _windows(tokens, at[rows], context_length), batch_size)


def _windows(tokens: Ids, starts: np.ndarray, context_length: int) -> Batch:
    """Cut a batch of windows; past the end of the tokens, padding is 0 with weight 0."""
    tokens = as_ids(tokens)
    rows = np.zeros((len(starts), context_length + 1), np.int32)
    for row, start in zip(rows, starts.tolist(), strict=True):
        chunk = tokens[start : start + context_length + 1]
        row[: chunk.size] = chunk
    counts = np.arange(context_length) < (tokens.size - 1 - starts)[:, None]
    return {"inputs": rows[:, :-1] * counts, "targets": rows[:, 1:].copy(), "weights": counts.astype(np.float32)}


# Packed documents


class PackedRows:
    """Rows of packed documents, ordered by their first documents, planned without copying any token.

    Takes about 16 bytes per document (60 while packing), and a few seconds for a million of them.
    """

    def __init__(self, tokens: Ids, eot_id: int, width: int):
        assert tokens.size > 1, "the first token is not predicted"
        documents = _document_starts(tokens, eot_id)
        self.n_documents, self.width = len(documents) - 1, width
        self._tokens = as_ids(tokens)
        self._starts = _cut(documents, width)
        self._pieces, self._bounds = _group(best_fit(np.diff(self._starts).astype(np.int32), width))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def batch(self, numbers: Int[np.ndarray, " batch"], only: Rows = ALL_ROWS) -> Batch:
        """Return a batch of the rows with the given numbers; ``only``: which rows of it."""
        rows = numbers[only]
        n_pieces = self._bounds[rows + 1] - self._bounds[rows]
        pieces = self._pieces[_ranges(self._bounds[rows], n_pieces)]
        lengths = self._starts[pieces + 1] - self._starts[pieces]
        where = _ranges(self._starts[pieces], lengths)
        n_tokens = np.bincount(np.repeat(np.repeat(np.arange(len(rows)), n_pieces), lengths), minlength=len(rows))
        filled = np.arange(self.width) < n_tokens[:, None]
        values = {
            "inputs": self._tokens[where],
            "targets": self._tokens[where + 1],
            "segment_ids": np.repeat(_ranges(np.ones_like(rows), n_pieces), lengths),
            "positions": _ranges(np.zeros_like(lengths), lengths),
        }
        arrays = {name: np.zeros(filled.shape, np.int32) for name in values}
        for name, filling in values.items():
            arrays[name][filled] = filling
        return {**arrays, "weights": filled.astype(np.float32)}

    def eval_batches(self, batch_size: int) -> EvalBatches:
        """Return every row once; padding of the last batch has weight 0."""
        return EvalBatches(np.arange(len(self)), self.batch, batch_size)

    @property
    def tokens_per_row(self) -> float:
        """Mean number of targets per row that count."""
        return (self._tokens.size - 1) / len(self)

    def describe(self) -> str:
        """Return a line with the numbers of documents and rows, and the share of padding."""
        documents = f"{self.n_documents:,} document{'' if self.n_documents == 1 else 's'}"
        rows = f"{len(self):,} row{'' if len(self) == 1 else 's'}"
        return f"packed {documents} into {rows} of {self.width:,}, {1 - self.tokens_per_row / self.width:.1%} padding"


def best_fit(lengths: Int32[np.ndarray, " pieces"], width: int) -> Int32[np.ndarray, " pieces"]:
    """Assign each piece to a row of at most ``width``: from the longest on, to the fullest row with room, or a new one.

    "Best-fit decreasing", in constant time per piece: open rows are indexed by their remaining room, and bit ``n`` of
    ``rooms`` is set if there is a row with room for ``n`` tokens.
    """
    row_of = np.empty(len(lengths), np.int32)
    by_room = [array("i") for _ in range(width + 1)]
    rooms = n_rows = 0
    for piece in np.argsort(-lengths, kind="stable"):
        length = int(lengths[piece])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = width, n_rows
            n_rows += 1
        row_of[piece] = row
        if left := room - length:
            by_room[left].append(row)
            rooms |= 1 << left
    return row_of


def _document_starts(tokens: Ids, eot_id: int) -> Int64[np.ndarray, " documents_and_1"]:
    """Return the starts of the documents, and the end of all inputs: the last token is only a target."""
    end = tokens.size - 1
    chunks = range(0, end, _CHUNK)
    found = np.concatenate([at + np.flatnonzero(tokens[at : min(at + _CHUNK, end)] == eot_id) for at in chunks])
    return np.concatenate([[0], found[found > 0], [end]])


def _cut(starts: Int64[np.ndarray, " starts"], width: int) -> Int64[np.ndarray, " pieces_and_1"]:
    """Add starts so that no piece between two of them is longer than ``width``."""
    n_pieces = -(-np.diff(starts) // width)
    nth = _ranges(np.zeros_like(n_pieces), n_pieces)
    return np.append(np.repeat(starts[:-1], n_pieces) + nth * width, starts[-1])


def _ranges(starts: Int[np.ndarray, " ranges"], lengths: Int[np.ndarray, " ranges"]) -> Int[np.ndarray, " all"]:
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def _group(row_of: Int32[np.ndarray, " pieces"]) -> tuple[Int32[np.ndarray, " pieces"], Int[np.ndarray, " rows_and_1"]]:
    """Return the pieces row by row (rows sorted by their first piece, pieces by text order), and the rows' bounds."""
    _, first = np.unique(row_of, return_index=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    ranks = rank[row_of]
    pieces = np.argsort(ranks, kind="stable").astype(np.int32)
    return pieces, np.concatenate([[0], np.cumsum(np.bincount(ranks))])
