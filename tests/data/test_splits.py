"""What must hold of splits: fractions come out whole, and what is in two of them is found."""

import pytest
from refusals import refused

from slm_jax.data.config import DataConfig
from slm_jax.data.splits import share, shared, split_fractions

SPLITS = {"train": ["a1", "b1"], "validation": ["c1", "c2"], "test": ["c3", "d1", "a2"]}


def letter(item):
    return item[0]


def test_a_split_with_a_source_of_its_own_takes_nothing():
    fractions = {"validation_fraction": 0.3, "test_fraction": 0.2}
    assert split_fractions(DataConfig(**fractions)) == (0.3, 0.2)
    assert split_fractions(DataConfig(validation_source="csv:a", **fractions)) == (0.0, 0.2)
    assert split_fractions(DataConfig(test_source="csv:a", **fractions)) == (0.3, 0.0)
    with refused(r"validation_fraction 0.5 and data.test_fraction 0.5 leave nothing to train"):
        split_fractions(DataConfig(validation_fraction=0.5, test_fraction=0.5))


@pytest.mark.parametrize("n", [10, 100, 1000, 10_000])
def test_a_share_is_rounded_down_but_for_the_last_digits_of_a_float(n):
    assert share(n, 1 - 0.1 - 0.2) == share(n, 0.7) == n * 7 // 10
    assert share(n, 0.1 + 0.2) == share(n, 0.3) == n * 3 // 10
    assert share(n + 1, 0.5) == n // 2
    assert share(n, 0.0) == 0


def test_what_is_in_two_splits_is_found_with_where_it_was_first():
    """Twice in the same split is nothing."""
    assert shared(SPLITS, letter) == [
        (("validation", "c1"), ("test", "c3")),
        (("train", "a1"), ("test", "a2")),
    ]
    assert shared({"train": ["a1", "a2"], "test": []}, letter) == []
