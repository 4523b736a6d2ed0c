"""What must hold of batches of labelled texts: every text as often as it should come, padded on the right."""

import numpy as np
import pytest
from refusals import refused

from slm_jax.data.text_batches import bucket_width, classification_batches, classification_eval_batches, encode_texts
from slm_jax.tokenizer import CharTokenizer


def texts(*lengths):
    """Texts of these lengths; the first token of text i is 100 + i, the others 7."""
    return [np.array([100 + i] + [7] * (n - 1), np.int32) for i, n in enumerate(lengths)]


def labelled(encoded):
    """Labels and weights that tell one text from another."""
    n = len(encoded)
    return np.arange(n, dtype=np.int32) % 3, 1 + np.arange(n, dtype=np.float32) / 8


def check(batch, encoded, labels):
    """Check that rows are what they should be; return which texts they hold (-1: filling)."""
    rows = np.where(batch["inputs"][:, 0] >= 100, batch["inputs"][:, 0] - 100, -1)
    for i, inputs, length, label in zip(rows, batch["inputs"], batch["lengths"], batch["labels"], strict=True):
        ids = encoded[i] if i >= 0 else np.zeros(1)
        assert length == len(ids)
        np.testing.assert_array_equal(inputs[:length], ids)
        assert not inputs[length:].any()
        assert label == (labels[i] if i >= 0 else 0)
    assert {key: value.dtype.name for key, value in batch.items()} == {
        "inputs": "int32", "lengths": "int32", "labels": "int32", "weights": "float32"
    }  # fmt: skip
    return rows


# Encoding


def test_texts_longer_than_the_limit_are_cut_at_the_end_and_counted():
    tokenizer = CharTokenizer().build_vocab("abc")
    encoded, n_truncated = encode_texts(["abcabc", "ab", "abc"], tokenizer, 3)
    assert [tokenizer.decode(ids) for ids in encoded] == ["abc", "ab", "abc"]
    assert n_truncated == 1
    assert all(ids.dtype == np.int32 for ids in encoded)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "text '' has no token"), ("aZ" * 99, r"text '(aZ){29}a: character 'Z' at offset 1 is not in the vocabulary")],
)
def test_a_text_that_cannot_be_encoded_is_named(text, said):
    with refused(f"^{said}"):
        encode_texts(["a", text], CharTokenizer().build_vocab("a"), 3)


# Widths


@pytest.mark.parametrize(
    ("longest", "limit", "width"),
    [(1, 64, 16), (16, 64, 16), (17, 64, 32), (32, 64, 32), (33, 64, 64), (33, 40, 40), (64, 64, 64), (5, 8, 8)],
)
def test_widths_are_powers_of_two_from_16_to_the_limit(longest, limit, width):
    assert bucket_width(longest, limit) == width


def test_a_batch_is_as_wide_as_its_own_longest_text_or_as_it_was_told():
    encoded = texts(3, 30)
    labels, weights = labelled(encoded)
    free = classification_batches(encoded, labels, weights, batch_size=1, limit=64, bucketed=True, seed=0)
    assert {free[i]["inputs"].shape for i in range(4)} == {(1, 16), (1, 32)}
    fixed = classification_batches(encoded, labels, weights, batch_size=1, limit=30, bucketed=False, seed=0)
    assert {fixed[i]["inputs"].shape for i in range(4)} == {(1, 30)}


# Training


def test_every_text_comes_once_an_epoch_in_a_new_order_and_batches_go_on_across_epochs():
    encoded = texts(*range(1, 11))
    labels, weights = labelled(encoded)
    batches = classification_batches(encoded, labels, weights, batch_size=4, limit=64, bucketed=True, seed=3)
    order = []
    for i in range(10):  # 40 texts: four epochs
        rows = check(batches[i], encoded, labels)
        np.testing.assert_array_equal(batches[i]["weights"], weights[rows])
        order += rows.tolist()
    epochs = [tuple(order[first : first + 10]) for first in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4


# Evaluation


@pytest.mark.parametrize(
    ("limit", "bucketed", "widths"), [(64, True, [16, 32, 64]), (40, True, [16, 32, 40]), (40, False, [40, 40, 40])]
)
def test_every_text_is_evaluated_once_and_filling_counts_nothing(limit, bucketed, widths):
    encoded = texts(40, 3, 17, 3, 1)
    labels, _ = labelled(encoded)
    batches = list(classification_eval_batches(encoded, labels, batch_size=2, limit=limit, bucketed=bucketed))
    rows = np.concatenate([check(batch, encoded, labels) for batch in batches])
    assert sorted(rows) == [-1, 0, 1, 2, 3, 4]
    np.testing.assert_array_equal(np.concatenate([batch["weights"] for batch in batches]), rows >= 0)
    assert [batch["inputs"].shape for batch in batches] == [(2, width) for width in widths]
