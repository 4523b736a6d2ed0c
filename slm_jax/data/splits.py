"""How one source is split in three, and which items share their key across splits."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from slm_jax.data.config import DataConfig
from slm_jax.errors import InputError

T = TypeVar("T")
Place = tuple[str, T]  # the split, and the item in it


def split_fractions(data: DataConfig) -> tuple[float, float]:
    """Return how much of the source validates and tests; nothing for a split that has a source of its own.

    Raises:
        InputError: they leave nothing to train on.
    """
    validation = 0.0 if data.validation_source else data.validation_fraction
    test = 0.0 if data.test_source else data.test_fraction
    if validation + test >= 1:
        raise InputError(
            f"data.validation_fraction {validation:g} and data.test_fraction {test:g} leave nothing to train on; "
            "expected a sum below 1"
        )
    return validation, test


def share(n: int, fraction: float) -> int:
    """Return how many of ``n`` a fraction is, rounded down, but for the last digits of a float.

    1 - 0.1 - 0.2 is a little more than 0.7, and other sums are a little less.
    """
    return math.floor(n * fraction + 1e-6)


def grouped(members: Iterable[T], keys: Iterable[Hashable]) -> list[list[T]]:
    """Return lists of the members with equal keys, in the order in which the keys first occur."""
    groups: dict[Hashable, list[T]] = {}
    for member, key in zip(members, keys, strict=True):
        groups.setdefault(key, []).append(member)
    return list(groups.values())


def first_places(splits: Mapping[str, Sequence[T]], key: Callable[[T], Hashable]) -> dict[Hashable, Place[T]]:
    """Return the split and the item in which each key first occurs."""
    first: dict[Hashable, Place[T]] = {}
    for name, items in splits.items():
        for item in items:
            first.setdefault(key(item), (name, item))
    return first


def shared(splits: Mapping[str, Sequence[T]], key: Callable[[T], Hashable]) -> list[tuple[Place[T], Place[T]]]:
    """Return the items whose key occurs in an earlier split, too, each after the first that has it there."""
    first = first_places(splits, key)
    pairs = [(first[key(item)], (name, item)) for name, items in splits.items() for item in items]
    return [(earlier, later) for earlier, later in pairs if earlier[0] != later[0]]
