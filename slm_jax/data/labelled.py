"""Labelled texts: from a source to training, validation and test texts, and to batches.

A batch is a dict of ``inputs`` (int32, (batch, width), padded with zeros on the right), ``lengths`` (int32, (batch,),
at least 1), ``labels`` (int32, (batch,)) and ``weights`` (float32, (batch,), 0 for rows that fill the last batch).
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer

from slm_jax.data.config import ClassificationConfig, DataConfig
from slm_jax.data.file_sources import Table
from slm_jax.data.rows import Row
from slm_jax.data.sources import parse_source
from slm_jax.data.splits import SPLITS, check_apart, grouped, require_filled, share, shared, split_fractions
from slm_jax.data.windows import Batch, EvalBatches, Rows, TrainBatches, bucket_width, endless_batches
from slm_jax.errors import InputError, located
from slm_jax.tokenizer import Tokenizer

_SHOWN_CLASSES = 20
_WHOLE_NUMBER = re.compile(r"-?\d{1,18}")


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """The texts of one split, their class indices, and where they are from, for error messages."""

    texts: tuple[str, ...]
    labels: Int32[np.ndarray, " texts"]
    places: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LabelledSplits:
    """The texts of all splits, the class names by index, and notes for the user."""

    train: LabelledTexts
    validation: LabelledTexts
    test: LabelledTexts
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return a SHA-256 that is equal only if classes, texts, labels and order are equal."""
        splits = [(split.texts, split.labels.tolist()) for split in (self.train, self.validation, self.test)]
        return hashlib.sha256(json.dumps([self.classes, splits]).encode()).hexdigest()


class _Item(NamedTuple):
    """A text, its label, where it is from, and a key that equal texts share, ignoring differences in white space."""

    where: str
    text: str
    label: str
    key: str


def load_labelled(data: DataConfig, cfg: ClassificationConfig, seed: int) -> LabelledSplits:
    """Read labelled texts, check every row, balance and split them.

    Without validation and test sources, one source is split into three. Balancing comes first (as in the book) and does
    not change a separate validation or test source.

    Raises:
        InputError: a source cannot be read; a row has no text or label; fewer than two classes; a class has no training
            text; a split is empty; with ``cfg.group_duplicates``, equal texts in separate sources.
    """
    items, names = _read(data.source, cfg)
    classes = names or _sorted_classes({item.label for item in items})
    if len(classes) < 2:
        raise InputError(f"{data.source}: one class only ({classes[0]!r:.60}); expected at least two")
    rng = np.random.default_rng(seed)
    balance: list[str] = []
    if cfg.balance == "downsample":
        n_all, items = len(items), _downsample(items, rng)
        balance = [f"balance: {n_all - len(items)} of {n_all} texts left out; the classes are equally frequent"]
    splits = _split(items, data, cfg, rng)
    for name, source in (("validation", data.validation_source), ("test", data.test_source)):
        if source is not None:
            splits[name], _ = _read(source, cfg)
    indices = {name: i for i, name in enumerate(classes)}
    _check_splits(splits, indices)
    if cfg.group_duplicates:
        allow = ", or classification.group_duplicates=false"
        check_apart(splits, lambda item: item.key, what="text", remedy=allow)
    labelled, notes = {}, []
    for name, split in splits.items():
        counts = Counter(item.label for item in split)
        shown = [f"{counts[each]} {each:.60}" for each in classes[:_SHOWN_CLASSES]]
        more = [f"{len(classes) - len(shown):,} more classes"] if len(classes) > len(shown) else []
        notes.append(f"{name}: {len(split)} texts ({', '.join([*shown, *more])})")
        labels = np.array([indices[item.label] for item in split], np.int32)
        texts, places = tuple(item.text for item in split), tuple(item.where for item in split)
        labelled[name] = LabelledTexts(texts, labels, places)
    return LabelledSplits(**labelled, classes=classes, notes=(*notes, *balance, *_describe_duplicates(splits)))


def class_weights(labels: Integer[np.ndarray, " texts"], n_classes: int) -> Float32[np.ndarray, " classes"]:
    """Return class weights inversely proportional to class frequencies (not 0), with mean 1 over the texts."""
    counts = np.bincount(labels, minlength=n_classes)
    assert len(counts) == n_classes, "a label is out of range"
    assert counts.all(), "a class has no text"
    return (labels.size / (n_classes * counts)).astype(np.float32)


# Reading


def _read(text: str, cfg: ClassificationConfig) -> tuple[list[_Item], tuple[str, ...]]:
    source = parse_source(text, header=cfg.columns)
    if cfg.columns and not isinstance(source, Table):
        raise InputError(f"classification.columns names the columns of csv: and tsv: files; {source} has its own")
    text_column = cfg.text_column or source.text_column()
    label_column = cfg.label_column or "label"
    names = source.class_names(label_column)
    items = []
    for row in source.read_rows(columns=(text_column, label_column)):
        content = row.filled(text_column, "classification.text_column")
        items.append(_Item(row.where, content, _label(row, label_column, names), " ".join(content.split())))
    return items, names


def _label(row: Row, column: str, names: Sequence[str]) -> str:
    """Return a row's label as text: the class name of an index; true and false as in JSON."""
    value: Any = row.field(column, "classification.label_column")
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    # TensorFlow Datasets uses label -1 in test sets with unpublished labels.
    if names or not isinstance(value, str | int) or (isinstance(value, str) and not value.strip()):
        expected = f"a class, 0 to {len(names) - 1}" if names else "text, a whole number, true or false"
        raise InputError(f"{row.where}: {column} is {value!r:.60}; expected {expected}")
    return row.text(column).strip() if isinstance(value, str) else json.dumps(value)


def _sorted_classes(labels: set[str]) -> tuple[str, ...]:
    by_number = all(_WHOLE_NUMBER.fullmatch(label) for label in labels)
    return tuple(sorted(sorted(labels), key=int) if by_number else sorted(labels))


# Balancing and splitting


def _downsample(items: list[_Item], rng: np.random.Generator) -> list[_Item]:
    """Keep as many texts of each class as the rarest has, in the order of the source."""
    classes = grouped(range(len(items)), [item.label for item in items])
    rarest = min(map(len, classes))
    return [items[i] for i in np.sort(np.concatenate([rng.permutation(members)[:rarest] for members in classes]))]


def _split(
    items: list[_Item], data: DataConfig, cfg: ClassificationConfig, rng: np.random.Generator
) -> dict[str, list[_Item]]:
    validation, test = split_fractions(data)
    units = grouped(items, [item.key if cfg.group_duplicates else i for i, item in enumerate(items)])
    strata = grouped(units, [unit[0].label for unit in units]) if cfg.split == "stratified" else [units]
    splits: dict[str, list[_Item]] = {name: [] for name in SPLITS}
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    placed = 0
    for stratum in strata:
        placed += sum(map(len, stratum))
        # Counted over all classes so far: if a class is too small for a split, the next one compensates.
        due = {name: placed * fraction for name, fraction in shares.items()}
        for i in rng.permutation(len(stratum)):
            below = [name for name in shares if share(placed, shares[name]) > len(splits[name])]
            if below:
                name = below[0]
            elif cfg.split == "random" and test:
                name = "test"  # gets the rest after rounding down, as in the book
            else:
                name = max(due, key=lambda name: due[name] - len(splits[name]))
            splits[name] += stratum[i]
    return splits


def _check_splits(splits: dict[str, list[_Item]], classes: Collection[str]) -> None:
    require_filled(splits)
    for name, items in splits.items():
        for item in items:
            if item.label not in classes:
                what = f"label {item.label!r:.60} of the {name} split never occurs in training"
                raise InputError(f"{item.where}: {what}; expected one of {', '.join(classes):.200}")
    trained = {item.label for item in splits["train"]}
    if missing := [name for name in classes if name not in trained]:
        raise InputError(f"class {missing[0]!r:.60} has no training text; expected more texts, or smaller fractions")


def _describe_duplicates(splits: dict[str, list[_Item]]) -> list[str]:
    """Report how many texts equal an earlier one, how many of these are in another split, and conflicting labels."""
    n_across = len(shared(splits, lambda item: item.key))
    items = [item for split in splits.values() for item in split]
    groups = grouped(items, [item.key for item in items])
    conflicts = [group[0].where for group in groups if len({item.label for item in group}) > 1]
    notes = []
    if n := len(items) - len(groups):
        notes.append(f"duplicates: {n:,} of {len(items):,} texts equal an earlier one, {n_across:,} in another split")
    if conflicts:
        notes.append(f"duplicates: {len(conflicts):,} texts have copies with another label, such as {conflicts[0]}")
    return notes


# Batches


def encode_text(text: str, tokenizer: Tokenizer) -> Int32[np.ndarray, " tokens"]:
    """Return the token ids of a text; InputError: the tokenizer cannot encode it, or there are no tokens."""
    try:
        ids = [*tokenizer.start_ids, *tokenizer.encode(text)]
    except InputError as error:
        raise InputError(f"text {text!r:.60}: {error}") from None
    if not ids:
        raise InputError(f"text {text!r:.60} has no token; expected at least one")
    return np.array(ids, np.int32)


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, max_length: int, places: Sequence[str] = ()
) -> tuple[list[Int32[np.ndarray, " tokens"]], int]:
    """Return the token ids of each text, truncated to ``max_length``, and how many texts were truncated."""
    encoded = []
    for text, where in itertools.zip_longest(texts, places):
        with located(where) if where else contextlib.nullcontext():
            encoded.append(encode_text(text, tokenizer))
    return [ids[:max_length] for ids in encoded], sum(ids.size > max_length for ids in encoded)


def classification_batches(
    encoded: Sequence[Int32[np.ndarray, " _"]],
    labels: Int32[np.ndarray, " texts"],
    weights: Float32[np.ndarray, " texts"],
    *,
    batch_size: int,
    limit: int,
    bucketed: bool,
    seed: int,
) -> TrainBatches:
    """Return the endless sequence of training batches; element ``i`` is the batch of step ``i``.

    Batches are ``limit`` tokens wide, or if ``bucketed``, the `bucket_width` of their longest text.
    """

    make = functools.partial(_batch, encoded, labels, weights, limit, bucketed)
    return endless_batches(len(encoded), make, batch_size=batch_size, seed=seed, whole=bucketed)


def classification_eval_batches(
    encoded: Sequence[Int32[np.ndarray, " _"]],
    labels: Int32[np.ndarray, " texts"],
    *,
    batch_size: int,
    limit: int,
    bucketed: bool,
) -> EvalBatches:
    """Return every text once, sorted by length to save padding; rows that fill the last batch have weight 0."""
    make = functools.partial(_batch, encoded, labels, np.ones(len(encoded), np.float32), limit, bucketed)
    return EvalBatches(np.argsort([ids.size for ids in encoded], kind="stable"), make, batch_size)


def _batch(
    encoded: Sequence[np.ndarray],
    labels: np.ndarray,
    weights: np.ndarray,
    limit: int,
    bucketed: bool,
    indices: np.ndarray,
    only: Rows,
) -> Batch:
    width = bucket_width(max(encoded[i].size for i in indices), limit) if bucketed else limit
    at = indices[only]
    rows = [encoded[i] for i in at]
    lengths = np.array([ids.size for ids in rows], np.int32)
    inputs = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(inputs, rows, strict=True):
        row[: ids.size] = ids
    return {"inputs": inputs, "lengths": lengths, "labels": labels[at], "weights": weights[at]}
