"""What must hold of windows and batches: what is in them, and that their order is a function of (seed, step)."""

import collections

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from slm_jax.data.windows import check_window, steps_per_epoch, train_batches, validation_batches, window_starts
from slm_jax.errors import InputError
from slm_jax.training.sharding import host_rows

TOKENS = np.arange(1000, 1053, dtype=np.uint16)  # each token tells where it stands


def batches(tokens=TOKENS, **changed):
    settings = {"context_length": 8, "batch_size": 3, "sampling": "stride", "stride": None, "shuffle": True, "seed": 5}
    return train_batches(tokens, **{**settings, **changed})


def starts(dataset, steps):
    """Where the windows of the first steps begin."""
    return [int(first) - 1000 for step in range(steps) for first in dataset[step]["inputs"][:, 0]]


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


# Windows at strides


def the_books_windows(token_ids, max_length, stride):
    """The loop of GPTDatasetV1 in the book's chapter 2."""
    inputs, targets = [], []
    for i in range(0, len(token_ids) - max_length, stride):
        inputs.append(token_ids[i : i + max_length])
        targets.append(token_ids[i + 1 : i + max_length + 1])
    return np.array(inputs), np.array(targets)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 53), context=st.integers(1, 12), stride=st.integers(1, 15) | st.none())
def test_stride_windows_are_the_books(n, context, stride):
    if n <= context:
        return
    inputs, targets = the_books_windows(TOKENS[:n], context, stride or context)
    dataset = batches(TOKENS[:n], context_length=context, stride=stride, shuffle=False, batch_size=len(inputs))
    for epoch in (0, 1):
        batch = dataset[epoch]
        np.testing.assert_array_equal(batch["inputs"], inputs)
        np.testing.assert_array_equal(batch["targets"], targets)
        assert (batch["weights"] == 1).all()
    settings = {"context_length": context, "batch_size": 2, "sampling": "stride", "stride": stride}
    assert steps_per_epoch(n, **settings) == len(inputs) / 2


def test_a_batch_has_the_documented_names_and_types():
    batch = batches()[0]
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "inputs": ((3, 8), np.int32),
        "targets": ((3, 8), np.int32),
        "weights": ((3, 8), np.float32),
    }
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_ids_above_int16_are_kept():
    assert (batches(np.full(20, 65_535, np.uint16))[0]["inputs"] == 65_535).all()
    assert (batches(np.full(20, 100_000, np.uint32))[0]["targets"] == 100_000).all()


def test_each_epoch_holds_every_window_once_and_in_another_order():
    n_windows = len(window_starts(53, 8, None))
    assert n_windows == 6
    dataset = batches()  # batches of 3: an epoch is 2
    drawn = starts(batches(batch_size=n_windows), 20)
    epochs = [drawn[i * n_windows :][:n_windows] for i in range(20)]
    assert all(sorted(epoch) == [0, 8, 16, 24, 32, 40] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    assert starts(dataset, 4) == [*epochs[0], *epochs[1]]


# Random offsets


def chi_square(counts):
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def test_random_offsets_are_uniform_over_all_that_fit():
    counts = collections.Counter(starts(batches(sampling="random", batch_size=100), 45))
    assert set(counts) == set(range(45))  # the last window's last target is the last token
    assert chi_square([counts[i] for i in range(45)]) < 91  # 44 degrees of freedom, p = 1e-4


def test_an_epoch_of_random_offsets_is_as_many_tokens_as_there_are():
    assert steps_per_epoch(1025, context_length=64, batch_size=4, sampling="random", stride=None) == 4


# Order


@pytest.mark.parametrize("sampling", ["stride", "random"])
def test_a_batch_is_a_function_of_seed_and_step(sampling):
    """However it is reached: by index, in any order, by iterating, or going on from a saved state."""
    dataset = batches(sampling=sampling)
    direct = [dataset[step] for step in range(12)]
    again = batches(sampling=sampling)
    for step in reversed(range(12)):
        same(again[step], direct[step])
    for step, batch in zip(range(12), again, strict=False):
        same(batch, direct[step])

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    for step in range(7):
        same(next(iterator), direct[step])
    state = iterator.get_state()
    fresh = iter(batches(sampling=sampling).to_iter_dataset(options))
    fresh.set_state(state)
    for step in range(7, 12):
        same(next(fresh), direct[step])
        same(next(iterator), direct[step])


@pytest.mark.parametrize("sampling", ["stride", "random"])
def test_another_seed_is_another_order(sampling):
    assert starts(batches(sampling=sampling, seed=1), 6) != starts(batches(sampling=sampling, seed=2), 6)
    assert starts(batches(sampling=sampling, seed=0), 6) != starts(batches(sampling=sampling, seed=2**32 - 1), 6)


@pytest.mark.parametrize("n_hosts", [1, 2, 3])
def test_hosts_take_slices_of_one_global_batch(monkeypatch, n_hosts):
    dataset = batches(batch_size=6, sampling="random")
    monkeypatch.setattr(jax, "process_count", lambda: n_hosts)
    parts = []
    for host in range(n_hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        rows = host_rows(6)
        sliced = dataset.map(lambda batch, rows=rows: {name: value[rows] for name, value in batch.items()})
        parts.append(sliced[3])
    assert {len(part["inputs"]) for part in parts} == {6 // n_hosts}
    same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, dataset[3])


# Validation


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 50), context=st.integers(1, 12), batch_size=st.integers(1, 5))
def test_validation_counts_each_token_but_the_first_once(n, context, batch_size):
    tokens = TOKENS[:n]
    seen = []
    for batch in validation_batches(tokens, context_length=context, batch_size=batch_size):
        assert {value.shape for value in batch.values()} == {(batch_size, context)}
        assert set(np.unique(batch["weights"])) <= {0, 1}
        counted = batch["weights"] == 1
        np.testing.assert_array_equal(batch["targets"][counted], batch["inputs"][counted] + 1)
        for row, weights in zip(batch["inputs"], counted, strict=True):
            n_counted = weights.sum()
            assert weights[:n_counted].all()  # what fills a window is on its right
            np.testing.assert_array_equal(row[:n_counted], np.arange(n_counted) + row[0])
            assert (row[n_counted:] == 0).all()
        seen += batch["targets"][counted].tolist()
    assert seen == tokens[1:].tolist()


# What is refused


@pytest.mark.parametrize("sampling", ["stride", "random"])
def test_a_text_shorter_than_one_window_is_refused(sampling):
    for n in (0, 1, 8):
        with refused(rf"training split has {n} tokens, fewer than one window of 9") as error:
            batches(TOKENS[:n], sampling=sampling)
        assert "model.context_length" in str(error.value)
    same(batches(TOKENS[:9], sampling=sampling)[0], batches(TOKENS[:9], sampling=sampling)[5])  # one window only


def test_validation_needs_one_target():
    for n in (0, 1):
        with pytest.raises(InputError, match=f"validation split has {n} tokens, fewer than one window of 2"):
            check_window(n, 8, "validation")
    check_window(2, 8, "validation")  # a shorter window will do


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("random", [[234, 792, 451, 652], [838, 255, 774, 59], [167, 478, 487, 541]]),
        ("stride", [[224, 672, 712, 360], [512, 648, 880, 696], [120, 176, 448, 464]]),
    ],
)
def test_the_order_of_windows_never_changes(sampling, expected):
    """Another order would change the data of resumed runs."""
    dataset = batches(np.arange(1000, dtype=np.uint16), sampling=sampling, batch_size=4, seed=7)
    assert [dataset[step]["inputs"][:, 0].tolist() for step in (0, 1, 1000)] == expected


@pytest.mark.parametrize("sampling", ["random", "stride"])
def test_batches_of_one_window_can_be_iterated(sampling):
    """Grain counts what is endless in floating point, where the number is too large by one."""
    dataset = batches(sampling=sampling, batch_size=1)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    for step in range(3):
        same(next(iterator), dataset[step])


def test_a_mapped_file_gives_the_same_batches(tmp_path):
    TOKENS.tofile(tmp_path / "ids.bin")
    mapped = batches(np.memmap(tmp_path / "ids.bin", np.uint16, mode="r"))
    for step in range(4):
        same(mapped[step], batches()[step])
