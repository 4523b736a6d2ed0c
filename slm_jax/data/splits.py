"""Splitting one source into training, validation and test items, and finding equal items in different splits."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from slm_jax.data.config import DataConfig
from slm_jax.errors import InputError

SPLITS = ("train", "validation", "test")

T = TypeVar("T")
Place = tuple[str, T]  # the split, and the item in it


def split_fractions(data: DataConfig) -> tuple[float, float]:
    """Return the fractions for validation and test; 0 for a split that has its own source.

    InputError: they leave nothing to train on.
    """
    validation = 0.0 if data.validation_source else data.validation_fraction
    test = 0.0 if data.test_source else data.test_fraction
    if validation + test >= 1:
        sizes = f"data.validation_fraction {validation:g} and data.test_fraction {test:g}"
        raise InputError(f"{sizes} leave nothing to train on; expected a sum below 1")
    return validation, test


def share(n: int, fraction: float) -> int:
    """Return a fraction of ``n``, rounded down with a tolerance for rounding errors such as those of 1 - 0.1 - 0.2."""
    return math.floor(n * fraction + 1e-6)


def require_filled(splits: Mapping[str, Sequence[T]]) -> None:
    """Raise InputError if a split is empty."""
    if empty := [name for name, items in splits.items() if not items]:
        raise InputError(f"the {empty[0]} split is empty; expected more data, or other fractions of it")


def grouped(members: Iterable[T], keys: Iterable[Hashable]) -> list[list[T]]:
    """Group members with equal keys, in the order in which the keys first occur."""
    groups: dict[Hashable, list[T]] = {}
    for member, key in zip(members, keys, strict=True):
        groups.setdefault(key, []).append(member)
    return list(groups.values())


def shared(splits: Mapping[str, Sequence[T]], key: Callable[[T], Hashable]) -> list[tuple[Place[T], Place[T]]]:
    """Return pairs: the first item with a key, and an item of a later split with the same key."""
    first: dict[Hashable, Place[T]] = {}
    places = [(name, item) for name, items in splits.items() for item in items]
    pairs = [(first.setdefault(key(place[1]), place), place) for place in places]
    return [(earlier, later) for earlier, later in pairs if earlier[0] != later[0]]


def check_apart(
    splits: Mapping[str, Sequence[Any]],
    key: Callable[[Any], Hashable],
    *,
    what: str,
    separate: Sequence[str] = SPLITS,
    remedy: str = "",
) -> None:
    """Raise InputError if a split shares a key with one of ``separate``, the splits that have their own source.

    In the message, ``what`` names the key and ``remedy`` says how to allow it; items have their place as ``where``.
    """
    pairs = [(one, two) for one, two in shared(splits, key) if one[0] in separate or two[0] in separate]
    if pairs:
        (first_name, first), (name, item) = pairs[0]
        places = f"{item.where} ({name}) and {first.where} ({first_name})"
        raise InputError(f"{places} have the same {what} ({len(pairs):,} such); expected none in two splits{remedy}")
