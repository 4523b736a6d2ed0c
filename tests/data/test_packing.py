"""What must hold of packed documents: nothing lost, neighbours that change nothing, order as f(seed, step)."""

import collections
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm_jax.data import packing
from slm_jax.data.packing import PackedRows, best_fit, packed_validation_batches
from slm_jax.data.windows import endless_batches
from slm_jax.model import GPTConfig, GPTModel
from slm_jax.tasks.pretraining import make_loss_fn

EOT = 0


def stream(lengths, *, ends=False):
    """Documents whose tokens tell where they stand, with the end-of-text id between them, or after each."""
    tokens, n = [], 1
    for length in lengths:
        tokens += [*range(n, n + length), EOT]
        n += length
    return np.array(tokens if ends else tokens[:-1], np.uint16)


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


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


# What is in the rows


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3) | st.integers(4, 60_000), min_size=2, max_size=120),
    width=st.integers(1, 20),
)
@example(tokens=[EOT, EOT], width=3)
@example(tokens=[1, EOT], width=1)
@example(tokens=[EOT, 1, EOT, EOT, 2, EOT], width=2)
def test_every_token_but_the_first_is_a_target_once_behind_what_its_document_has_before_it(tokens, width):
    tokens = np.array(tokens, np.uint16)
    rows = PackedRows(tokens, EOT, width)
    found = [piece for row in range(len(rows)) for piece in pieces_of(rows[row])]
    assert collections.Counter(found) == collections.Counter(expected_pieces(tokens, width))
    assert rows.n_documents == 1 + np.count_nonzero(tokens[1:-1] == EOT)
    assert rows.tokens_per_row == pytest.approx(sum(len(targets) for _, targets in found) / len(rows))


def test_a_document_starts_after_the_end_of_the_one_before_and_learns_its_own():
    rows = PackedRows(np.array([EOT, 11, 12, EOT, 21, EOT], np.uint16), EOT, 8)
    assert rows.describe() == "packed 2 documents into 1 row of 8, 37.5% padding"
    (row,) = rows
    assert pieces_of(row) == [((EOT, 11, 12), (11, 12, EOT)), ((EOT, 21), (21, EOT))]
    assert {name: (value.shape, value.dtype) for name, value in row.items()} == {
        "inputs": ((8,), np.int32),
        "targets": ((8,), np.int32),
        "segment_ids": ((8,), np.int32),
        "positions": ((8,), np.int32),
        "weights": ((8,), np.float32),
    }


@pytest.mark.parametrize("ends", [False, True])
def test_the_search_for_documents_does_not_depend_on_how_much_is_searched_at_a_time(monkeypatch, ends):
    tokens = stream([5, 12, 3, 9, 1, 20, 7, 2], ends=ends)
    whole = PackedRows(tokens, EOT, 16)
    for chunk in (1, 7, len(tokens) - 1, len(tokens)):
        monkeypatch.setattr(packing, "_CHUNK", chunk)
        parts = PackedRows(tokens, EOT, 16)
        assert len(parts) == len(whole)
        for row in range(len(whole)):
            same(parts[row], whole[row])


def test_a_file_of_tokens_stays_out_of_memory(tmp_path):
    tokens = np.arange(16_000_000, dtype=np.uint32).astype("<u2")  # an end of text every 65,536
    tokens.tofile(tmp_path / "ids.bin")
    del tokens
    tracemalloc.start()
    try:
        rows = PackedRows(np.memmap(tmp_path / "ids.bin", "<u2", mode="r"), EOT, 1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6  # of 32 MB
    assert rows.n_documents == 245


# Best fit


def loads_of(row_of, lengths):
    return sorted(np.bincount(row_of, weights=lengths).astype(int).tolist())


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
    assert loads_of(row_of, lengths) == naive_best_fit(lengths.tolist(), width)
    assert (best_fit(lengths, width) == row_of).all()


# Neighbours


LENGTHS = [5, 12, 30, 9, 1, 20, 7, 2]  # one is longer than a row
PIECES = expected_pieces(stream(LENGTHS), 24)


@pytest.fixture(scope="module")
def model():
    """A model whose biases and position embeddings are not near zero, and its parameters."""
    cfg = GPTConfig(64 + 64, 24, emb_dim=16, n_heads=2, n_layers=2, tie_weights=False, unroll=False)
    model = GPTModel(cfg)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape),
        jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"],
    )
    return model, params


def packed_batch(lengths, batch_size):
    (batch,) = packed_validation_batches(PackedRows(stream(lengths), EOT, 24), batch_size=batch_size)
    return batch


def batch_of_one_each():
    """Each piece in a row of its own, with neither segments nor positions."""
    batch = {name: np.zeros((len(PIECES), 24), np.int32) for name in ("inputs", "targets")}
    for row, (inputs, targets) in enumerate(PIECES):
        batch["inputs"][row, : len(inputs)], batch["targets"][row, : len(targets)] = inputs, targets
    n_targets = np.array([[len(targets)] for _, targets in PIECES])
    return {**batch, "weights": (np.arange(24) < n_targets).astype(np.float32)}


def test_a_packed_document_is_computed_as_if_it_were_alone(model):
    module, params = model

    @jax.jit
    def run(inputs, segment_ids=None, positions=None):
        with jax.default_matmul_precision("highest"):
            return module.apply({"params": params}, inputs, segment_ids=segment_ids, positions=positions)

    batch, alone = packed_batch(LENGTHS, len(PIECES)), batch_of_one_each()
    logits = run(batch["inputs"], batch["segment_ids"], batch["positions"])
    by_inputs = dict(zip([inputs for inputs, _ in PIECES], np.asarray(run(alone["inputs"])), strict=True))
    n_compared = 0
    for row in range(len(logits)):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            (at,) = np.nonzero(batch["segment_ids"][row] == segment)
            expected = by_inputs[tuple(batch["inputs"][row, at].tolist())][: len(at)]
            assert jnp.abs(logits[row, at] - expected).max() <= 1e-5 * jnp.abs(expected).max()
            n_compared += 1
    assert n_compared == len(PIECES)
    assert batch["segment_ids"].max() >= 3
    mixed = run(batch["inputs"])  # what segment ids and positions are for
    assert jnp.abs(mixed - logits).max() > 0.1


def test_no_gradient_crosses_from_one_document_to_another(model):
    module, params = model
    batch = packed_batch([6, 8, 7], batch_size=1)
    assert batch["segment_ids"].max() == 3

    @jax.jit
    @jax.grad
    def gradient(params, batch, segment):
        options = {"segment_ids": batch["segment_ids"], "positions": batch["positions"]}
        logits = module.apply({"params": params}, batch["inputs"], **options)
        return (jnp.sin(logits) * (batch["segment_ids"] == segment)[..., None]).sum()

    for segment in (1, 2, 3):
        moved = np.abs(gradient(params, batch, segment)["tok_emb"]["embedding"]).sum(axis=-1) > 0
        assert np.flatnonzero(moved).tolist() == np.unique(batch["inputs"][batch["segment_ids"] == segment]).tolist()


def test_the_loss_of_a_packed_batch_is_the_mean_over_its_documents_fed_one_by_one(model):
    module, params = model
    loss_fn = jax.jit(lambda batch: make_loss_fn(module)(params, {}, batch, None)[:2])
    loss, n_targets = loss_fn(packed_batch(LENGTHS, len(PIECES)))
    expected, n_expected = loss_fn(batch_of_one_each())
    assert n_targets == n_expected == stream(LENGTHS).size - 1
    assert float(loss / n_targets) == pytest.approx(float(expected / n_expected), rel=1e-5)


# Order

TOKENS = stream(np.random.default_rng(1).integers(2, 12, 40))
ROWS = PackedRows(TOKENS, EOT, 16)


def test_without_shuffling_rows_come_in_the_order_of_their_first_documents():
    """A row's first input is mostly the end-of-text id; its first target tells rows apart."""
    drawn = [int(ROWS[row]["targets"][0]) for row in range(len(ROWS))]
    assert drawn == sorted(drawn)
    assert drawn[0] == 2


def test_validation_has_every_row_once_and_fills_the_last_batch_with_nothing():
    found = list(packed_validation_batches(ROWS, batch_size=6))
    assert {batch["inputs"].shape for batch in found} == {(6, 16)}
    assert sum(batch["weights"].sum() for batch in found) == TOKENS.size - 1
    rows = [{name: value[i] for name, value in batch.items()} for batch in found for i in range(6)]
    for row in range(len(ROWS)):
        same(rows[row], ROWS[row])
    assert len(rows) > len(ROWS)
    assert not any(value.any() for row in rows[len(ROWS) :] for value in row.values())


def test_the_order_of_rows_never_changes():
    """Another order would change the data of resumed runs."""
    tokens = np.arange(1, 401, dtype=np.uint16)
    tokens[::9] = tokens[::23] = 0
    rows = PackedRows(tokens, 0, 16)
    dataset = endless_batches(len(rows), rows.batch, batch_size=4, seed=7)
    found = [dataset[step]["inputs"][:, 1].tolist() for step in (0, 1, 1000)]
    assert found == [[301, 65, 2, 56], [317, 137, 117, 0], [94, 0, 65, 20]]
    assert dataset[0]["targets"][0].tolist() == [*range(301, 307), 0, *range(353, 361), 0]
    assert dataset[0]["segment_ids"][0].tolist() == [1] * 7 + [2] * 9
    assert dataset[0]["positions"][0].tolist() == [*range(7), *range(9)]
