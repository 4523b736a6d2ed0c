"""What must hold of ids in shards: they are read as if they were one array."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.data import windows
from slm_jax.data.ids import ShardedIds, split_ids

SHARDS = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def shards_of(sizes: list[int]) -> tuple[np.ndarray, ShardedIds]:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    return whole, ShardedIds(np.split(whole, np.cumsum(sizes)[:-1]))


@given(SHARDS, st.integers(-3, 45), st.integers(-3, 45), st.data())
def test_slices_and_places_are_those_of_one_array(sizes, start, stop, data):
    whole, ids = shards_of(sizes)
    assert (len(ids), ids.size, ids.shape, ids.dtype) == (whole.size, whole.size, whole.shape, whole.dtype)
    np.testing.assert_array_equal(ids[start:stop], whole[start:stop])
    np.testing.assert_array_equal(ids[:], whole)
    if whole.size:
        places = data.draw(st.lists(st.integers(-whole.size, whole.size - 1), max_size=8))
        np.testing.assert_array_equal(ids[np.array(places, int)], whole[np.array(places, int)])
        assert ids[-1] == whole[-1]


@given(SHARDS, st.data())
def test_parts_are_those_of_one_array(sizes, data):
    whole, ids = shards_of(sizes)
    at = data.draw(st.integers(0, whole.size))
    for part, expected in zip(split_ids(ids, at), split_ids(whole, at), strict=True):
        np.testing.assert_array_equal(part[:], expected)
        assert part.size == expected.size


def test_batches_of_shards_are_those_of_one_array():
    tokens = np.random.default_rng(0).integers(9, size=500).astype(np.uint16)
    ids = ShardedIds(np.split(tokens, [100, 101, 350]))
    for sampling in ("stride", "random"):
        cut = {"context_length": 7, "batch_size": 4, "sampling": sampling, "stride": 3, "shuffle": True, "seed": 1}
        for ours, theirs in zip(
            windows.train_batches(ids, **cut)[:9], windows.train_batches(tokens, **cut)[:9], strict=True
        ):
            np.testing.assert_equal(ours, theirs)
    rows, expected = (windows.PackedRows(each, 3, 16) for each in (ids, tokens))
    np.testing.assert_equal(rows.batch(np.arange(len(rows))), expected.batch(np.arange(len(rows))))
