"""Texts with their class, split into training, validation and test texts."""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer

from slm_jax.data.config import ClassificationConfig, DataConfig
from slm_jax.data.row_files import Table
from slm_jax.data.rows import Row
from slm_jax.data.sources import parse_source
from slm_jax.data.splits import SPLITS, check_apart, grouped, require_filled, share, split_fractions
from slm_jax.errors import InputError

_WHOLE_NUMBER = re.compile(r"-?\d{1,18}")


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """The texts of one split.

    Attributes:
        texts: as their source has them.
        labels: the index of each text's class.
    """

    texts: tuple[str, ...]
    labels: Int32[np.ndarray, " texts"]


@dataclasses.dataclass(frozen=True)
class LabelledSplits:
    """The texts of all splits.

    Attributes:
        train: at least one text of each class.
        validation: not empty.
        test: not empty.
        classes: the classes' names, by index.
        notes: lines for the user: texts of each split and class, texts left out, equal texts.
    """

    train: LabelledTexts
    validation: LabelledTexts
    test: LabelledTexts
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return a SHA-256: the same only if classes, texts, their labels and their order are the same."""
        splits = [(split.texts, split.labels.tolist()) for split in (self.train, self.validation, self.test)]
        return hashlib.sha256(json.dumps([self.classes, splits]).encode()).hexdigest()


class _Item(NamedTuple):
    """A text with its label; its place, for messages; and the key of equal texts, which ignores white space."""

    where: str
    text: str
    label: str
    key: str


def load_labelled(data: DataConfig, cfg: ClassificationConfig, seed: int) -> LabelledSplits:
    """Read labelled texts, check every row, balance and split them.

    Without validation and test sources, one source is split into three: ``data.validation_fraction`` and
    ``data.test_fraction`` of its texts, and the rest for training. Balancing comes first (as in the book) and
    doesn't change a separate validation or test source.

    Raises:
        InputError: a source that cannot be read; a row without text or label; fewer than two classes; a class without
            training text; an empty split; with ``cfg.group_duplicates``, equal texts in two separate sources.
    """
    items, names = _read(data.source, cfg)
    classes = names or _sorted_classes({item.label for item in items})
    if len(classes) < 2:
        raise InputError(f"{data.source}: one class only ({classes[0]!r:.60}); expected at least two")
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    if cfg.balance == "downsample":
        items, note = _downsample(items, rng)
        notes.append(note)
    splits = _split(items, data, cfg, rng)
    for name, source in (("validation", data.validation_source), ("test", data.test_source)):
        if source is not None:
            splits[name], _ = _read(source, cfg)
    _check_splits(splits, classes)
    if cfg.group_duplicates:
        allow = ", or classification.group_duplicates=false"
        check_apart(splits, lambda item: item.key, what="text", remedy=allow)
    index = {name: i for i, name in enumerate(classes)}
    labelled = {
        name: LabelledTexts(
            tuple(item.text for item in split), np.array([index[item.label] for item in split], np.int32)
        )
        for name, split in splits.items()
    }
    described = [_describe(name, split, classes) for name, split in splits.items()]
    return LabelledSplits(**labelled, classes=classes, notes=(*described, *notes, *_describe_duplicates(splits)))


def class_weights(labels: Integer[np.ndarray, " texts"], n_classes: int) -> Float32[np.ndarray, " classes"]:
    """Return a weight for each class, inverse to how often it occurs (at least once), with mean 1 over the texts."""
    counts = np.bincount(labels, minlength=n_classes)
    assert len(counts) == n_classes, "a label is out of range"
    assert counts.all(), "a class has no text"
    return (labels.size / (n_classes * counts)).astype(np.float32)


# Reading


def _read(text: str, cfg: ClassificationConfig) -> tuple[list[_Item], tuple[str, ...]]:
    """Return the texts of a source, checked, and its classes where it declares them."""
    source = parse_source(text, header=cfg.columns)
    if cfg.columns and not isinstance(source, Table):
        raise InputError(f"classification.columns names the columns of csv: and tsv: files; {source} has its own")
    text_column = cfg.text_column or source.text_column()
    label_column = cfg.label_column or "label"
    names = source.class_names(label_column)
    rows = source.read_rows(columns=(text_column, label_column))
    return [_item(row, text_column, label_column, names) for row in rows], names


def _item(row: Row, text_column: str, label_column: str, names: Sequence[str]) -> _Item:
    text = row.filled(text_column, "classification.text_column")
    return _Item(row.where, text, _label(row, label_column, names), " ".join(text.split()))


def _label(row: Row, column: str, names: Sequence[str]) -> str:
    """Return a row's label as text: an index as its class's name, true and false as JSON spells them."""
    value: Any = row.field(column, "classification.label_column")
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    # TensorFlow Datasets has the label -1 in test sets whose labels are not published.
    if names or not isinstance(value, str | int) or (isinstance(value, str) and not value.strip()):
        raise InputError(
            f"{row.where}: {column} is {value!r:.60}; expected "
            + (f"a class, 0 to {len(names) - 1}" if names else "text, a whole number, true or false")
        )
    return row.text(column).strip() if isinstance(value, str) else json.dumps(value)


def _sorted_classes(labels: set[str]) -> tuple[str, ...]:
    by_number = all(_WHOLE_NUMBER.fullmatch(label) for label in labels)
    return tuple(sorted(sorted(labels), key=int) if by_number else sorted(labels))


# Balancing and splitting


def _downsample(items: list[_Item], rng: np.random.Generator) -> tuple[list[_Item], str]:
    """Keep as many texts of each class as of the rarest, in the order of the source."""
    classes = grouped(range(len(items)), [item.label for item in items])
    rarest = min(map(len, classes))
    kept = np.sort(np.concatenate([rng.permutation(members)[:rarest] for members in classes]))
    note = f"balance: {_count(len(items) - len(kept), 'text')} of {len(items)} left out, {rarest} of each class kept"
    return [items[i] for i in kept], note


def _split(
    items: list[_Item], data: DataConfig, cfg: ClassificationConfig, rng: np.random.Generator
) -> dict[str, list[_Item]]:
    """Split a source's texts by the fractions of those splits that have no source of their own."""
    validation, test = split_fractions(data)
    units = grouped(items, [item.key if cfg.group_duplicates else i for i, item in enumerate(items)])
    strata = grouped(units, [unit[0].label for unit in units]) if cfg.split == "stratified" else [units]
    splits: dict[str, list[_Item]] = {name: [] for name in SPLITS}
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    placed = 0
    for stratum in strata:
        placed += sum(map(len, stratum))
        # Over all classes so far: if a class is too small for a split, the next one makes up for it.
        due = {name: placed * fraction for name, fraction in shares.items()}
        for i in rng.permutation(len(stratum)):
            below = (name for name in shares if share(placed, shares[name]) > len(splits[name]))
            name = next(below, None) or _rest(due, splits, cfg)
            splits[name] += stratum[i]
    return splits


def _rest(due: dict[str, float], splits: dict[str, list[_Item]], cfg: ClassificationConfig) -> str:
    """Return the split for what rounding down leaves over: test (as in the book), or the one most below due."""
    if cfg.split == "random" and due["test"]:
        return "test"
    return max(due, key=lambda name: due[name] - len(splits[name]))


def _check_splits(splits: dict[str, list[_Item]], classes: Sequence[str]) -> None:
    require_filled(splits)
    for name, items in splits.items():
        for item in items:
            if item.label not in classes:
                raise InputError(
                    f"{item.where}: label {item.label!r:.60} of the {name} split never occurs in training; "
                    f"expected one of {', '.join(classes):.200}"
                )
    trained = {item.label for item in splits["train"]}
    if missing := [name for name in classes if name not in trained]:
        raise InputError(
            f"class {missing[0]!r:.60} has no training text ({len(missing)} of {len(classes)} classes); expected more "
            "texts of it, or a smaller data.validation_fraction and data.test_fraction"
        )


# Notes


def _describe(name: str, items: list[_Item], classes: Sequence[str]) -> str:
    counts = Counter(item.label for item in items)
    return f"{name}: {_count(len(items), 'text')} ({', '.join(f'{counts[label]} {label}' for label in classes)})"


def _describe_duplicates(splits: dict[str, list[_Item]]) -> list[str]:
    """Report how many texts equal another one, across splits, and with different labels."""
    placed = [(name, item) for name, items in splits.items() for item in items]
    groups = [group for group in grouped(placed, [item.key for _, item in placed]) if len(group) > 1]
    if not groups:
        return []
    across = sum(len({name for name, _ in group}) > 1 for group in groups)
    notes = [
        f"duplicates: {_count(sum(map(len, groups)), 'text')} in {_count(len(groups), 'group')} of equal ones, "
        f"{across or 'none'} of them across splits"
    ]
    if conflicts := [group for group in groups if len({item.label for _, item in group}) > 1]:
        first, n = conflicts[0][0][1].where, _count(len(conflicts), "group")
        notes.append(f"duplicates: {n} of equal texts with different labels, such as {first}")
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
