"""What must hold of batches of tokens: what is in them, and that their order is a function of (seed, step)."""

import collections
import itertools
import tracemalloc
from unittest import mock

import grain
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import refused

from slm_jax.data import windows
from slm_jax.data.instructions import Tokens, instruction_eval_batches
from slm_jax.data.labelled import classification_eval_batches
from slm_jax.data.windows import (
    EvalBatches,
    PackedRows,
    best_fit,
    bucket_width,
    check_window,
    endless_batches,
    fill_up,
    steps_per_epoch,
    train_batches,
    validation_batches,
    window_starts,
)
from slm_jax.model import GPTConfig, GPTModel
from slm_jax.tasks.pretraining import make_loss_fn

TOKENS = np.arange(1000, 1053, dtype=np.uint16)  # each token tells where it stands
SAMPLINGS = pytest.mark.parametrize("sampling", ["stride", "random"])


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


def shapes(batch):
    return {name: (value.shape, value.dtype) for name, value in batch.items()}


@pytest.mark.parametrize(
    ("longest", "limit", "width"),
    [(1, 64, 16), (16, 64, 16), (17, 64, 32), (33, 64, 64), (33, 40, 40), (5, 8, 8)],
)
def test_widths_are_powers_of_two_from_16_to_the_limit(longest, limit, width):
    assert bucket_width(longest, limit) == width


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


def test_a_batch_has_the_documented_names_and_types_and_ids_above_int16():
    tokens = ((3, 8), np.int32)
    assert shapes(batches()[0]) == {"inputs": tokens, "targets": tokens, "weights": ((3, 8), np.float32)}
    assert (batches(np.full(20, 65_535, np.uint16))[0]["inputs"] == 65_535).all()
    assert (batches(np.full(20, 100_000, np.uint32))[0]["targets"] == 100_000).all()


def test_each_epoch_holds_every_window_once_and_in_another_order():
    n_windows = len(window_starts(53, 8, None))
    assert n_windows == 6
    drawn = starts(batches(batch_size=n_windows), 20)
    epochs = [drawn[i * n_windows :][:n_windows] for i in range(20)]
    assert all(sorted(epoch) == [0, 8, 16, 24, 32, 40] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    assert starts(batches(), 4) == [*epochs[0], *epochs[1]]  # batches of 3: an epoch is 2


# Random offsets


def test_random_offsets_are_uniform_over_all_that_fit():
    counts = collections.Counter(starts(batches(sampling="random", batch_size=100), 45))
    assert set(counts) == set(range(45))  # the last window's last target is the last token
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_square < 91  # 44 degrees of freedom, p = 1e-4
    # an epoch is as many tokens as there are
    assert steps_per_epoch(1025, context_length=64, batch_size=4, sampling="random", stride=None) == 4


# Order


@SAMPLINGS
def test_a_batch_is_a_function_of_seed_and_step(tmp_path, sampling):
    """However it is reached: by index, in any order, by iterating, or going on from a saved state."""
    dataset = batches(sampling=sampling)
    direct = [dataset[step] for step in range(12)]
    TOKENS.tofile(tmp_path / "ids.bin")
    mapped = batches(np.memmap(tmp_path / "ids.bin", np.uint16, mode="r"), sampling=sampling)
    for step in reversed(range(12)):
        same(mapped[step], direct[step])

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    for step in range(7):
        same(next(iterator), direct[step])
    state = iterator.get_state()
    fresh = iter(batches(sampling=sampling).to_iter_dataset(options))
    fresh.set_state(state)
    for step in range(7, 12):
        same(next(fresh), direct[step])
    assert starts(batches(sampling=sampling, seed=1), 6) != starts(batches(sampling=sampling, seed=2), 6)
    assert starts(batches(sampling=sampling, seed=0), 6) != starts(batches(sampling=sampling, seed=2**32 - 1), 6)
    alone = batches(sampling=sampling, batch_size=1)  # grain counts what is endless in floating point: one too many
    same(next(iter(alone.to_iter_dataset(options))), alone[0])


@SAMPLINGS
def test_a_host_makes_only_its_rows_of_the_global_batch(monkeypatch, sampling):
    dataset, made = batches(batch_size=6, sampling=sampling), []
    cut = windows._windows
    monkeypatch.setattr(windows, "_windows", lambda tokens, at, length: made.append(len(at)) or cut(tokens, at, length))
    for rows in ([0, 1, 2], [0, 3, 5], []):
        part, whole = dataset.of_rows(np.array(rows, int))[3], dataset[3]
        same(part, {name: value[rows] for name, value in whole.items()})
    assert made == [3, 6, 3, 6, 0, 6]


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


def evaluated():
    """The batches of four rows of each kind of data: windows, packed documents, texts, instructions."""
    ids = [np.arange(1, n, dtype=np.int32) for n in (40, 3, 17, 5, 2, 9)]
    alone = {"limit": 64, "bucketed": True}
    examples = [[Tokens(each, np.ones(len(each), bool))] for each in ids]
    return {
        "windows": validation_batches(TOKENS, context_length=8, batch_size=4),
        "packed": PackedRows(stream([5, 12, 30, 9, 1, 20, 7, 2]), EOT, 16).eval_batches(4),
        "texts": classification_eval_batches(ids, np.arange(6, dtype=np.int32), batch_size=4, **alone),
        "instructions": instruction_eval_batches(examples, batch_size=4, packed=False, **alone),
    }


@pytest.mark.parametrize("kind", ["windows", "packed", "texts", "instructions"])
@pytest.mark.parametrize("rows", [[0, 1, 4, 5], [2, 3], [6, 7]], ids=str)
def test_a_host_evaluates_only_its_own_rows_of_which_those_beyond_the_batch_are_empty(kind, rows):
    whole, own = evaluated()[kind], evaluated()[kind].of_rows(np.array(rows))
    assert len(list(whole)) == len(list(own)) > 1
    for batch, part in zip(whole, own, strict=True):
        same(part, {name: value[rows] for name, value in fill_up(batch, 8).items()})
        assert shapes(part).keys() == shapes(batch).keys()
        assert [value.dtype for value in part.values()] == [value.dtype for value in batch.values()]


def test_a_host_does_not_make_the_rows_of_others():
    made = []
    batches = EvalBatches(np.arange(10), lambda items, rows: made.append(items[rows]) or {"x": items[rows]}, 4)
    list(batches.of_rows(np.array([1, 3])))
    assert [part.tolist() for part in made] == [[1, 3], [5, 7], [9]]


@SAMPLINGS
def test_a_text_shorter_than_one_window_is_refused(sampling):
    for n in (0, 1, 8):
        with refused(rf"training split has {n} tokens, fewer than one window of 9; .* model.context_length"):
            batches(TOKENS[:n], sampling=sampling)
    same(batches(TOKENS[:9], sampling=sampling)[0], batches(TOKENS[:9], sampling=sampling)[5])  # one window only
    with refused("validation split has 1 tokens, fewer than one window of 2"):
        check_window(1, 8, "validation")
    check_window(2, 8, "validation")  # a shorter window will do


# Packed documents

EOT = 0


def stream(lengths):
    """Documents whose tokens tell where they stand, with the end-of-text id between them."""
    tokens, n = [], 1
    for length in lengths:
        tokens += [*range(n, n + length), EOT]
        n += length
    return np.array(tokens[:-1], np.uint16)


def rows_of(packed):
    """The rows of packed documents, one after the other."""
    batch = packed.batch(np.arange(len(packed)))
    return [{name: value[row] for name, value in batch.items()} for row in range(len(packed))]


def pieces_of(row):
    """The inputs and targets of each piece of a row, after its arrays were looked at."""
    n_used = int((row["segment_ids"] > 0).sum())
    found = []
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        (at,) = np.nonzero(row["segment_ids"] == segment)
        assert at.tolist() == list(range(at[0], at[-1] + 1))
        assert row["positions"][at].tolist() == list(range(len(at)))
        found.append((tuple(row["inputs"][at].tolist()), tuple(row["targets"][at].tolist())))
    assert sum(len(inputs) for inputs, _ in found) == n_used
    assert row["weights"].tolist() == [1.0] * n_used + [0.0] * (len(row["weights"]) - n_used)
    assert not any(row[name][n_used:].any() for name in ("inputs", "targets", "segment_ids", "positions"))
    return found


def expected_pieces(tokens, width):
    """Each input with its target, cut before end-of-text and after so many tokens, one token at a time."""
    pieces = []
    for inputs, target in itertools.pairwise(tokens):
        if not pieces or inputs == EOT or len(pieces[-1][0]) == width:
            pieces.append(([], []))
        pieces[-1][0].append(int(inputs))
        pieces[-1][1].append(int(target))
    return [(tuple(inputs), tuple(targets)) for inputs, targets in pieces]


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3) | st.integers(4, 60_000), min_size=2, max_size=120),
    width=st.integers(1, 20),
    searched=st.sampled_from([1, 7, 1000]),
)
@example(tokens=[EOT, EOT], width=3, searched=1)
@example(tokens=[1, EOT], width=1, searched=1)
@example(tokens=[EOT, 1, EOT, EOT, 2, EOT], width=2, searched=5)
def test_every_token_but_the_first_is_a_target_once_behind_what_its_document_has_before_it(tokens, width, searched):
    """However many tokens are searched for documents at a time."""
    tokens = np.array(tokens, np.uint16)
    with mock.patch.object(windows, "_CHUNK", searched):
        packed = PackedRows(tokens, EOT, width)
    found = [piece for row in rows_of(packed) for piece in pieces_of(row)]
    assert collections.Counter(found) == collections.Counter(expected_pieces(tokens, width))
    assert packed.n_documents == 1 + np.count_nonzero(tokens[1:-1] == EOT)
    assert packed.tokens_per_row == pytest.approx(sum(len(targets) for _, targets in found) / len(packed))


def test_a_document_starts_after_the_end_of_the_one_before_and_learns_its_own():
    packed = PackedRows(np.array([EOT, 11, 12, EOT, 21, EOT], np.uint16), EOT, 8)
    assert packed.describe() == "packed 2 documents into 1 row of 8, 37.5% padding"
    (row,) = rows_of(packed)
    assert pieces_of(row) == [((EOT, 11, 12), (11, 12, EOT)), ((EOT, 21), (21, EOT))]
    tokens = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), ((8,), np.int32))
    assert shapes(row) == {**tokens, "weights": ((8,), np.float32)}


def test_a_file_of_tokens_stays_out_of_memory(tmp_path):
    np.arange(16_000_000, dtype=np.uint32).astype("<u2").tofile(tmp_path / "ids.bin")  # an end of text every 65,536
    tracemalloc.start()
    try:
        packed = PackedRows(np.memmap(tmp_path / "ids.bin", "<u2", mode="r"), EOT, 1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6  # of 32 MB
    assert packed.n_documents == 245


def naive_best_fit(lengths, width):
    """The loads of rows, by looking at all of them for each piece."""
    loads = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(loads)) if loads[row] + length <= width]
        if fitting:
            loads[max(fitting, key=lambda row: loads[row])] += length
        else:
            loads.append(length)
    return sorted(loads)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), width=st.integers(1, 40))
def test_each_piece_goes_into_the_fullest_row_that_has_room(data, width):
    lengths = np.array(data.draw(st.lists(st.integers(1, width), min_size=1, max_size=60)), np.int32)
    row_of = best_fit(lengths, width)
    loads = np.bincount(row_of, weights=lengths).astype(int)
    assert sorted(loads.tolist()) == naive_best_fit(lengths.tolist(), width)
    assert (best_fit(lengths, width) == row_of).all()


def test_the_loss_of_a_packed_batch_is_the_mean_over_its_documents_fed_one_by_one():
    lengths = [5, 12, 30, 9, 1, 20, 7, 2]  # one is longer than a row
    pieces = expected_pieces(stream(lengths), 24)
    alone = {name: np.zeros((len(pieces), 24), np.int32) for name in ("inputs", "targets", "weights")}
    for row, (inputs, targets) in enumerate(pieces):
        alone["inputs"][row, : len(inputs)], alone["targets"][row, : len(targets)] = inputs, targets
        alone["weights"][row, : len(targets)] = 1
    (packed,) = PackedRows(stream(lengths), EOT, 24).eval_batches(len(pieces))
    assert packed["segment_ids"].max() >= 3

    model = GPTModel(GPTConfig(128, 24, emb_dim=16, n_heads=2, n_layers=2, tie_weights=False, unroll=False))
    params = jax.tree.map(  # biases and position embeddings that are not near zero
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape),
        jax.jit(model.init)(jax.random.key(0), packed["inputs"])["params"],
    )
    loss_fn = jax.jit(lambda batch: make_loss_fn(model)(params, {}, batch, None)[:2])
    loss, n_targets = loss_fn(packed)
    expected, n_expected = loss_fn({**alone, "weights": alone["weights"].astype(np.float32)})
    assert n_targets == n_expected == stream(lengths).size - 1
    assert float(loss / n_targets) == pytest.approx(float(expected / n_expected), rel=1e-5)


def test_validation_has_every_row_once_in_the_order_of_first_documents_and_fills_the_last_batch_with_nothing():
    tokens = stream(np.random.default_rng(1).integers(2, 12, 40))
    packed = PackedRows(tokens, EOT, 16)
    found = list(packed.eval_batches(6))
    assert {batch["inputs"].shape for batch in found} == {(6, 16)}
    assert sum(batch["weights"].sum() for batch in found) == tokens.size - 1
    rows = [{name: value[i] for name, value in batch.items()} for batch in found for i in range(6)]
    for row, expected in zip(rows, rows_of(packed), strict=False):
        same(row, expected)
    assert len(rows) > len(packed)
    assert not any(value.any() for row in rows[len(packed) :] for value in row.values())
    first_targets = [int(row["targets"][0]) for row in rows[: len(packed)]]  # the first input is mostly end-of-text
    assert first_targets == sorted(first_targets)
    assert first_targets[0] == 2


def test_the_order_of_rows_never_changes():
    """Another order would change the data of resumed runs."""
    tokens = np.arange(1, 401, dtype=np.uint16)
    tokens[::9] = tokens[::23] = 0
    packed = PackedRows(tokens, 0, 16)
    dataset = endless_batches(len(packed), packed.batch, batch_size=4, seed=7)
    found = [dataset[step]["inputs"][:, 1].tolist() for step in (0, 1, 1000)]
    assert found == [[301, 65, 2, 56], [317, 137, 117, 0], [94, 0, 65, 20]]
    assert dataset[0]["targets"][0].tolist() == [*range(301, 307), 0, *range(353, 361), 0]
    assert dataset[0]["segment_ids"][0].tolist() == [1] * 7 + [2] * 9
    assert dataset[0]["positions"][0].tolist() == [*range(7), *range(9)]
