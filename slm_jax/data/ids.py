"""Token ids that are read like one array, but may be in several files."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from jaxtyping import Integer


class ShardedIds:
    """Consecutive arrays of ids that can be indexed like one 1-D array: size, slices, and arrays of indices.

    Indexing reads ids into an array; `part` reads nothing.
    """

    def __init__(self, shards: Sequence[Integer[np.ndarray, " _"]]) -> None:
        assert shards
        self._shards = [np.asarray(shard) for shard in shards]  # slicing a np.memmap is slower
        self._starts = np.array([0, *accumulate(map(len, shards))])
        self.dtype, self.size = shards[0].dtype, int(self._starts[-1])
        self.shape, self.ndim = (self.size,), 1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: Any) -> Any:
        if isinstance(where, slice):
            start, stop, step = where.indices(self.size)
            assert step == 1, "only slices without a step"
            pieces = self._pieces(start, stop)
            return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])
        where = np.asarray(where)
        assert where.size == 0 or -self.size <= where.min() <= where.max() < self.size, "outside of the ids"
        where = np.where(where < 0, where + self.size, where)
        shards = np.searchsorted(self._starts, where, side="right") - 1
        found = np.empty(where.shape, self.dtype)
        for number in np.unique(shards):
            here = shards == number
            found[here] = self._shards[number][where[here] - self._starts[number]]
        return found[()]

    def part(self, start: int, stop: int) -> "ShardedIds":
        """Return the ids from ``start`` up to but not including ``stop``, without reading them."""
        return ShardedIds(self._pieces(start, stop) or [np.zeros(0, self.dtype)])

    def _pieces(self, start: int, stop: int) -> list[Integer[np.ndarray, " _"]]:
        if start >= stop:
            return []
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        bounds = zip(range(first, last + 1), self._starts[first : last + 1].tolist(), strict=True)
        return [self._shards[i][max(0, start - at) : stop - at] for i, at in bounds]


Ids = np.ndarray | ShardedIds


def split_ids(tokens: Ids, at: int) -> tuple[Ids, Ids]:
    """Split ids before index ``at``, without reading them."""
    if isinstance(tokens, ShardedIds):
        return tokens.part(0, at), tokens.part(at, tokens.size)
    return tokens[:at], tokens[at:]


def as_ids(tokens: Any) -> Ids:
    """Return ids as a plain array, which is faster to slice than np.memmap; shards stay as they are."""
    return tokens if isinstance(tokens, ShardedIds) else np.asarray(tokens)
