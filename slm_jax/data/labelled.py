"""Texts with the class each belongs to, split into what trains, validates and tests."""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer

from slm_jax.data.builtin import prose_or_code
from slm_jax.data.config import ClassificationConfig, DataConfig
from slm_jax.data.named import named_file
from slm_jax.data.rows import Row, read_jsonl, read_table, read_tfds, tfds_builder
from slm_jax.data.sources import parse_source
from slm_jax.data.splits import grouped, share, shared, split_fractions
from slm_jax.errors import InputError
from slm_jax.files import user_path

KINDS = {
    "builtin": "builtin:prose-or-code",
    "csv": "csv:FILE",
    "tsv": "tsv:FILE",
    "jsonl": "jsonl:FILE",
    "tfds": "tfds:NAME",
    "named": "named:sms-spam",
}
DELIMITERS = {"csv": ",", "tsv": "\t"}
TFDS_TEXTS = ("text", "sentence", "description")  # what data sets call their text; the first that is there

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
    """What trains, validates and tests.

    Attributes:
        train: at least one text of each class.
        validation: not empty.
        test: not empty.
        classes: the classes' names, by index.
        notes: lines for the user: texts of each split and class, what was left out, equal texts.
    """

    train: LabelledTexts
    validation: LabelledTexts
    test: LabelledTexts
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return a SHA-256: the same only where classes, texts, their labels and their order are the same."""
        splits = [(split.texts, split.labels.tolist()) for split in (self.train, self.validation, self.test)]
        return hashlib.sha256(json.dumps([self.classes, splits]).encode()).hexdigest()


class _Item(NamedTuple):
    """A text with its label; where it stands, for messages; and what equal texts share: all but white space."""

    where: str
    text: str
    label: str
    key: str


def load_labelled(data: DataConfig, cfg: ClassificationConfig, seed: int) -> LabelledSplits:
    """Read labelled texts, check every row, balance and split them.

    A source without a second and third one is split into three: ``data.validation_fraction`` and
    ``data.test_fraction`` of its texts, and the rest, which trains. Balancing comes first (the book's order), and
    touches no validation or test source that is given.

    Args:
        data: the sources and the fractions.
        cfg: which columns they have, and how they are balanced and split.
        seed: of balancing and splitting.

    Raises:
        InputError: a source that cannot be read; a row without text or label; fewer than two classes; a class that
            never trains; an empty split; with ``cfg.group_duplicates``, equal texts in two splits that are given.
    """
    items, names = _read(data.source, cfg)
    classes = names or _sorted_classes({item.label for item in items})
    if len(classes) < 2:
        raise InputError(f"{data.source}: one class only ({classes[0]!r:.60}); expected texts of at least two")
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    if cfg.balance == "downsample":
        items, note = _downsample(items, rng)
        notes.append(note)
    splits = _split(items, data, cfg, rng)
    for name, source in (("validation", data.validation_source), ("test", data.test_source)):
        if source is not None:
            splits[name], _ = _read(source, cfg)
    _check_splits(splits, classes, cfg.group_duplicates)
    index = {name: i for i, name in enumerate(classes)}
    labelled = {
        name: LabelledTexts(
            tuple(item.text for item in split), np.array([index[item.label] for item in split], np.int32)
        )
        for name, split in splits.items()
    }
    notes = [*(_describe(name, split, classes) for name, split in splits.items()), *notes]
    notes += _describe_duplicates(splits)
    return LabelledSplits(**labelled, classes=classes, notes=tuple(notes))


def class_weights(labels: Integer[np.ndarray, " texts"], n_classes: int) -> Float32[np.ndarray, " classes"]:
    """Return a weight for each class, inverse to how often it occurs, with mean 1 over the texts.

    Args:
        labels: the class of each text, from 0 to below ``n_classes``.
        n_classes: how many classes there are.

    Raises:
        InputError: a label out of range; a class without a text.
    """
    if labels.size and not 0 <= labels.min() <= labels.max() < n_classes:
        raise InputError(f"labels from {labels.min()} to {labels.max()}; expected from 0 to {n_classes - 1}")
    counts = np.bincount(labels, minlength=n_classes)
    if not counts.all():
        raise InputError(f"class {np.argmin(counts)} has no text, and so no weight; expected at least one of each")
    return (labels.size / (n_classes * counts)).astype(np.float32)


# Reading


def _read(source: str, cfg: ClassificationConfig) -> tuple[list[_Item], tuple[str, ...]]:
    """Return the texts of a source, checked, and its classes where it declares them."""
    kind, rest = parse_source(source, KINDS)
    if cfg.columns and kind not in DELIMITERS:
        raise InputError(f"classification.columns names columns of csv: and tsv: files; {source} has its own: leave it")
    if kind in ("builtin", "named") and source != KINDS[kind]:
        raise InputError(f"source {source!r} holds no labelled texts; expected {KINDS[kind]}")
    text, label = cfg.text_column or "text", cfg.label_column or "label"
    names: tuple[str, ...] = ()
    if kind == "builtin":
        rows = [Row(f"{source} text {i}", {"text": t, "label": c}) for i, (t, c) in enumerate(prose_or_code())]
    elif kind == "named":
        rows = read_table(named_file(rest), "\t", ("label", "text"))
    elif kind == "jsonl":
        rows = read_jsonl(user_path(rest))
    elif kind == "tfds":
        dataset, _, split = rest.partition(":")
        features = dict(tfds_builder(dataset).info.features.items())
        text = cfg.text_column or next((name for name in TFDS_TEXTS if name in features), text)
        names = tuple(getattr(features.get(label), "names", None) or ())
        rows = read_tfds(dataset, split or "train")
    else:
        rows = read_table(user_path(rest), DELIMITERS[kind], cfg.columns)
    if not rows:
        raise InputError(f"{source}: empty; expected at least one labelled text")
    return [_item(row, text, label, names) for row in rows], names


def _item(row: Row, text: str, label: str, names: Sequence[str]) -> _Item:
    for key, column in (("text_column", text), ("label_column", label)):
        if column not in row.fields:
            raise InputError(
                f"{row.where}: no column {column!r} but {', '.join(row.fields) or 'none':.200}; set "
                f"classification.{key} to one of them, or classification.columns for a table without a header line"
            )
    value = row.text(text)
    if not value.strip():
        raise InputError(f"{row.where}: {text} is empty; expected a text: take the row out")
    return _Item(row.where, value, _label(row, label, names), " ".join(value.split()))


def _label(row: Row, column: str, names: Sequence[str]) -> str:
    """Return a row's label as text: an index as its class's name, true and false as JSON spells them."""
    value: Any = row.field(column)
    secret = bool(names) and value == -1  # in test sets of TensorFlow Datasets whose labels are not published
    if value is None or secret or (isinstance(value, str) and not value.strip()):
        raise InputError(
            f"{row.where}: {column} is {value!r}, no label; expected one for each text: take the row out, "
            "or use another split"
        )
    if names and isinstance(value, int):
        if not 0 <= value < len(names):
            raise InputError(f"{row.where}: {column} is {value}, no class; expected 0 to {len(names) - 1}")
        return names[value]
    if not isinstance(value, str | int):
        raise InputError(f"{row.where}: {column} is {value!r:.60}; expected text, a whole number, true or false")
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
    note = f"balance: {_texts(len(items) - len(kept))} of {len(items)} left out, {rarest} of each class kept"
    return [items[i] for i in kept], note


def _split(
    items: list[_Item], data: DataConfig, cfg: ClassificationConfig, rng: np.random.Generator
) -> dict[str, list[_Item]]:
    """Split a source's texts by the fractions of those splits that have no source of their own."""
    validation, test = split_fractions(data)
    units = grouped(items, [item.key if cfg.group_duplicates else i for i, item in enumerate(items)])
    strata = grouped(units, [unit[0].label for unit in units]) if cfg.split == "stratified" else [units]
    splits: dict[str, list[_Item]] = {"train": [], "validation": [], "test": []}
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    placed = 0
    for stratum in strata:
        placed += sum(map(len, stratum))
        # Over all classes so far: what a small one cannot give to a split, the next one does.
        due = {name: placed * fraction for name, fraction in shares.items()}
        for i in rng.permutation(len(stratum)):
            below = (name for name in shares if share(placed, shares[name]) > len(splits[name]))
            name = next(below, None) or _rest(due, splits, cfg)
            splits[name] += stratum[i]
    return splits


def _rest(due: dict[str, float], splits: dict[str, list[_Item]], cfg: ClassificationConfig) -> str:
    """Return the split of what is over when all are rounded down: the book's test split, or the one most below due."""
    if cfg.split == "random" and due["test"]:
        return "test"
    return max(due, key=lambda name: due[name] - len(splits[name]))


def _check_splits(splits: dict[str, list[_Item]], classes: Sequence[str], keep_apart: bool) -> None:
    trained = {item.label for item in splits["train"]}
    for name, items in splits.items():
        if not items:
            raise InputError(
                f"the {name} split has no text; expected at least one: more texts, or other values of "
                "data.validation_fraction and data.test_fraction"
            )
        for item in items:
            if item.label not in classes:
                raise InputError(
                    f"{item.where}: label {item.label!r:.60} of the {name} split never occurs in training; "
                    f"expected one of {', '.join(classes):.200}"
                )
    if missing := [name for name in classes if name not in trained]:
        raise InputError(
            f"class {missing[0]!r:.60} has no text to train on ({len(missing)} of {len(classes)} classes); expected "
            "at least one of each: more texts of it, or none, or a smaller validation and test fraction"
        )
    if keep_apart:
        _check_apart(splits)


def _check_apart(splits: dict[str, list[_Item]]) -> None:
    """Refuse equal texts in two splits: in one that was given, they cannot be moved."""
    if pairs := shared(splits, lambda item: item.key):
        (first_name, first), (name, item) = pairs[0]
        raise InputError(
            f"{item.where} ({name}) and {first.where} ({first_name}) are equal; {_texts(len(pairs))} in a second "
            "split, expected none: take them out, or allow it with classification.group_duplicates=false"
        )


# Notes


def _describe(name: str, items: list[_Item], classes: Sequence[str]) -> str:
    counts = Counter(item.label for item in items)
    return f"{name}: {_texts(len(items))} ({', '.join(f'{counts[label]} {label}' for label in classes)})"


def _describe_duplicates(splits: dict[str, list[_Item]]) -> list[str]:
    """Say how many texts equal another one, whether across splits, and whether under another label."""
    placed = [(name, item) for name, items in splits.items() for item in items]
    groups = [group for group in grouped(placed, [item.key for _, item in placed]) if len(group) > 1]
    if not groups:
        return []
    across = sum(len({name for name, _ in group}) > 1 for group in groups)
    notes = [
        f"duplicates: {_texts(sum(map(len, groups)))} in {_groups(len(groups))} of equal ones, "
        f"{across or 'none'} of them across splits"
    ]
    if conflicts := [group for group in groups if len({item.label for _, item in group}) > 1]:
        first = conflicts[0][0][1].where
        notes.append(f"duplicates: {_groups(len(conflicts))} of equal texts with different labels, such as {first}")
    return notes


def _texts(number: int) -> str:
    return f"{number} text{'' if number == 1 else 's'}"


def _groups(number: int) -> str:
    return f"{number} group{'' if number == 1 else 's'}"
