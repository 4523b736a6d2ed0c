"""Documents packed into rows, each seeing only itself, in an order that is f(seed, step).

The tokens are cut right before every end-of-text id, so that a piece is ``[eot, t1 … tn]`` with the targets
``[t1 … tn, eot]``: every token but the first is a target once, and a document's start is learned after the same id
that generation starts from. What is longer than a row is cut again.

A batch has ``inputs`` and ``targets`` (int32, (batch, context), targets one token on), ``weights`` (float32, 0 on
padding), ``segment_ids`` (int32, 1, 2 … for a row's pieces, 0 for padding) and ``positions`` (int32, from 0 in each
piece). Padding is on the right.
"""

from array import array
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int, Int32, Int64, Integer

from slm_jax.data.windows import Batch
from slm_jax.errors import InputError

_CHUNK = 1 << 22  # tokens searched at a time, so that a memory-mapped file stays out of memory
_INT_ARRAYS = ("inputs", "targets", "segment_ids", "positions")


class PackedRows:
    """Rows of packed documents; which documents share one is fixed here, and no token is copied.

    Takes about 16 bytes a document (60 while they are packed), and a few seconds for a million of them.

    Attributes:
        n_documents: the documents.
        width: tokens of a row.
    """

    def __init__(self, tokens: Integer[np.ndarray, " tokens"], eot_id: int, width: int):
        """Find the documents and pack them.

        Args:
            tokens: at least 2.
            eot_id: what documents start after.
            width: tokens of a row: the context length.

        Raises:
            InputError: fewer tokens.
        """
        if tokens.size < 2:
            raise InputError(f"{tokens.size} tokens to pack; expected at least 2, as the first is not predicted")
        documents = _document_starts(tokens, eot_id)
        self.n_documents = len(documents) - 1
        self.width = width
        self._tokens = tokens
        self._starts = _cut(documents, width)
        self._pieces, self._bounds = _group(best_fit(np.diff(self._starts).astype(np.int32), width))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, row: int) -> Batch:
        arrays = {name: np.zeros(self.width, np.int32) for name in _INT_ARRAYS}
        column = 0
        for segment, piece in enumerate(self._pieces[self._bounds[row] : self._bounds[row + 1]], start=1):
            start, end = self._starts[piece], self._starts[piece + 1]
            at = slice(column, column + end - start)
            arrays["inputs"][at] = self._tokens[start:end]
            arrays["targets"][at] = self._tokens[start + 1 : end + 1]
            arrays["segment_ids"][at] = segment
            arrays["positions"][at] = np.arange(end - start)
            column = at.stop
        return {**arrays, "weights": (arrays["segment_ids"] > 0).astype(np.float32)}

    @property
    def tokens_per_row(self) -> float:
        """The targets of a row that count, on average."""
        return (self._tokens.size - 1) / len(self)

    def describe(self) -> str:
        """Say in a line what was packed and how much of it is padding."""
        documents = f"{self.n_documents:,} document{'' if self.n_documents == 1 else 's'}"
        rows = f"{len(self):,} row{'' if len(self) == 1 else 's'}"
        return f"packed {documents} into {rows} of {self.width:,}, {1 - self.tokens_per_row / self.width:.1%} padding"


def packed_batches(rows: PackedRows, *, batch_size: int, shuffle: bool, seed: int) -> grain.MapDataset:
    """Return the endless sequence of training batches; element ``i`` is the batch of step ``i``.

    Args:
        rows: the packed documents.
        batch_size: rows of a batch. Batches go on across the end of an epoch, so no row is left out.
        shuffle: whether rows come in a new random order each epoch; or else in the order of their first documents.
        seed: of that order.
    """
    dataset = grain.MapDataset.source(rows).seed(seed)
    return (dataset.shuffle() if shuffle else dataset).repeat().batch(batch_size)


def packed_validation_batches(rows: PackedRows, *, batch_size: int) -> Iterator[Batch]:
    """Yield every row once; what fills the last batch has weight 0."""
    for first in range(0, len(rows), batch_size):
        batch = [rows[row] for row in range(first, min(first + batch_size, len(rows)))]
        batch += [{name: np.zeros_like(value) for name, value in batch[0].items()}] * (batch_size - len(batch))
        yield {name: np.stack([row[name] for row in batch]) for name in batch[0]}


def best_fit(lengths: Int32[np.ndarray, " pieces"], width: int) -> Int32[np.ndarray, " pieces"]:
    """Give each piece a row of at most ``width``: from the longest on, the fullest row that has room, or a new one.

    "Best-fit decreasing", in constant time a piece: open rows are kept by the room that is left, and a bit says for
    each room whether there is such a row.
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


def _document_starts(tokens: Integer[np.ndarray, " tokens"], eot_id: int) -> Int64[np.ndarray, " documents_and_1"]:
    """Return where documents start, and last where all inputs end: the last token is only a target."""
    end = tokens.size - 1
    starts = [
        begin + np.flatnonzero(tokens[begin : min(begin + _CHUNK, end)] == eot_id) for begin in range(0, end, _CHUNK)
    ]
    found = np.concatenate(starts)
    return np.concatenate([[0], found[found > 0], [end]])


def _cut(starts: Int64[np.ndarray, " starts"], width: int) -> Int64[np.ndarray, " pieces_and_1"]:
    """Add starts, so that nothing between two of them is longer than ``width``."""
    n_pieces = -(-np.diff(starts) // width)
    first = np.cumsum(n_pieces) - n_pieces
    nth = np.arange(n_pieces.sum()) - np.repeat(first, n_pieces)
    return np.append(np.repeat(starts[:-1], n_pieces) + nth * width, starts[-1])


def _group(row_of: Int32[np.ndarray, " pieces"]) -> tuple[Int32[np.ndarray, " pieces"], Int[np.ndarray, " rows_and_1"]]:
    """Return the pieces row by row, in the order of the text within a row and of rows' first pieces, and the bounds."""
    _, first = np.unique(row_of, return_index=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    ranks = rank[row_of]
    pieces = np.argsort(ranks, kind="stable").astype(np.int32)
    return pieces, np.concatenate([[0], np.cumsum(np.bincount(ranks))])
