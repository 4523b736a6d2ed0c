"""What must hold of labelled texts: rows checked, balanced and split by seed, and batches that have each text once."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from slm_jax.data.config import ClassificationConfig, DataConfig
from slm_jax.data.labelled import (
    class_weights,
    classification_batches,
    classification_eval_batches,
    encode_texts,
    load_labelled,
)
from slm_jax.tokenizer import CharTokenizer

SPLITS = ("train", "validation", "test")


def load(source, seed=0, *, data=None, **settings):
    return load_labelled(DataConfig(source=source, **(data or {})), ClassificationConfig(**settings), seed)


def write(path: Path, rows) -> str:
    """Write (text, label) as a table; return the source."""
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return f"csv:{path}"


def numbered(**counts):
    """Different texts, that many of each class."""
    return [(f"{label} {i}", label) for label, n in counts.items() for i in range(n)]


def pairs(split, classes):
    return list(zip(split.texts, (classes[i] for i in split.labels), strict=True))


def everything(splits):
    return [pair for name in SPLITS for pair in pairs(getattr(splits, name), splits.classes)]


def sizes(splits):
    return tuple(len(getattr(splits, name).texts) for name in SPLITS)


def test_columns_can_be_named_and_a_table_can_be_without_a_header_line(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("".join(f"{label}\tx\t{text}\n" for text, label in numbered(ham=10, spam=10)))
    splits = load(f"tsv:{path}", columns=("kind", "extra", "message"), text_column="message", label_column="kind")
    assert sorted(everything(splits)) == sorted(numbered(ham=10, spam=10))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([2, 10, -1], ("-1", "2", "10")),
        (["2", "10", "b"], ("10", "2", "b")),
        ([True, False], ("false", "true")),
        ([" b ", "a"], ("a", "b")),
    ],
)
def test_classes_are_the_distinct_labels_sorted(tmp_path, labels, classes):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{label} {i}", "label": label} for label in labels for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    splits = load(f"jsonl:{path}")
    assert splits.classes == classes
    assert splits.train.labels.dtype == np.int32
    assert all(text.split()[0].lower() == label for text, label in everything(splits))


# Splits


def test_one_source_is_split_by_its_fractions_and_by_seed(tmp_path):
    rows = numbered(ham=600, spam=894)
    source = write(tmp_path / "rows.csv", rows)
    first, again, other = (load(source, seed, split="random") for seed in (1, 1, 2))
    assert sizes(first) == sizes(other) == (1045, 149, 300)
    assert sorted(everything(first)) == sorted(rows)
    assert everything(first) == everything(again) != everything(other)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_stratified_keeps_the_shares_of_the_classes_and_rounds_over_all_of_them(tmp_path):
    splits = load(write(tmp_path / "rows.csv", numbered(a=100, b=20, c=10)), split="stratified")
    counts = [np.bincount(getattr(splits, name).labels).tolist() for name in SPLITS]
    assert counts == [[70, 14, 7], [10, 2, 1], [20, 4, 2]]
    for n_classes, n_each, expected in ((20, 5, (70, 10, 20)), (60, 2, (84, 12, 24))):
        rows = numbered(**{f"class{i}": n_each for i in range(n_classes)})
        assert sizes(load(write(tmp_path / "rows.csv", rows), split="stratified")) == expected


def test_given_splits_are_whole_and_the_rest_comes_from_the_first(tmp_path):
    train, validation, test = (
        write(tmp_path / f"{name}.csv", [(f"{name} {text}", label) for text, label in numbered(a=20, b=20)])
        for name in SPLITS
    )
    both = load(train, data={"validation_source": validation, "test_source": test})
    assert sizes(both) == (40, 40, 40)
    assert sizes(load(train, data={"validation_source": validation})) == (32, 40, 8)
    assert sizes(load(train, data={"test_source": test})) == (36, 4, 40)
    for name in SPLITS:
        assert all(text.startswith(name) for text in getattr(both, name).texts)


# Balance


@pytest.mark.parametrize("split", ["stratified", "random"])
def test_downsampling_keeps_as_many_of_each_class_as_of_the_rarest_but_of_given_splits(tmp_path, split):
    rows = numbered(a=50, b=20, c=30)
    source = write(tmp_path / "rows.csv", rows)
    splits = load(source, balance="downsample", split=split)
    assert Counter(label for _, label in everything(splits)) == {"a": 20, "b": 20, "c": 20}
    assert len(set(everything(splits)) & set(rows)) == 60
    assert set(everything(splits)) != set(everything(load(source, 1, balance="downsample", split=split)))
    assert any("40 of 100 texts left out" in note for note in splits.notes)
    test = write(tmp_path / "test.csv", [(f"test {text}", label) for text, label in numbered(a=9, b=3, c=1)])
    splits = load(source, balance="downsample", split=split, data={"test_source": test})
    assert np.bincount(splits.test.labels).tolist() == [9, 3, 1]
    assert len(splits.train.texts) == 54


def test_class_weights_are_inverse_to_the_counts_with_mean_1_over_the_texts():
    labels = np.array([0] * 6 + [1] * 3 + [2], np.int32)
    weights = class_weights(labels, 3)
    np.testing.assert_allclose(weights * np.bincount(labels), [10 / 3] * 3, rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1)
    assert weights.dtype == np.float32


# Equal texts


def collapsed(split):
    return {" ".join(text.split()) for text in split.texts}


@pytest.fixture
def repeated(tmp_path):
    """A source in which each text is there two to four times, at times with other white space."""
    rows = [
        (f"{label} {i}" if k % 2 else f" {label}   {i}", label)
        for label in "ab"
        for i in range(40)
        for k in range(2 + i % 3)
    ]
    return write(tmp_path / "rows.csv", rows), rows


@pytest.mark.parametrize("split", ["stratified", "random"])
def test_equal_texts_stay_in_one_split_and_are_counted(repeated, split):
    source, rows = repeated
    splits = load(source, split=split)
    assert sorted(everything(splits)) == sorted(rows)
    train, validation, test = (collapsed(getattr(splits, name)) for name in SPLITS)
    assert not train & validation | train & test | validation & test
    assert all(
        abs(n - wanted) <= 12 for n, wanted in zip(sizes(splits), np.array([0.7, 0.1, 0.2]) * len(rows), strict=True)
    )
    n = len(rows)
    assert f"duplicates: {n - 80} of {n} texts equal an earlier one, 0 in another split" in splits.notes


def test_without_grouping_equal_texts_may_be_in_two_splits_and_are_counted(repeated):
    source, rows = repeated
    splits = load(source, split="random", group_duplicates=False)
    n_train, n_validation = int(0.7 * len(rows)), int(0.1 * len(rows))
    assert sizes(splits) == (n_train, n_validation, len(rows) - n_train - n_validation)
    assert collapsed(splits.train) & collapsed(splits.test)
    assert any(f"{len(rows) - 80} of {len(rows)} texts equal an earlier one" in note for note in splits.notes)


def test_equal_texts_with_different_labels_are_reported(tmp_path):
    rows = [*numbered(a=20, b=20), ("same", "a"), ("same", "b"), ("a 0", "a")]
    notes = load(write(tmp_path / "rows.csv", rows)).notes
    assert any("2 of 43 texts equal an earlier one" in note for note in notes)
    assert any(re.search("1 texts have copies with another label, such as .* line 4", note) for note in notes)


def test_equal_texts_across_given_splits_are_refused_unless_allowed(tmp_path):
    train = write(tmp_path / "train.csv", numbered(a=20, b=20))
    test = write(tmp_path / "test.csv", [("new", "a"), (" a  3", "a"), ("b 1", "b"), ("more", "b")])
    with refused(r"test.csv line 3 \(test\) and \S*train.csv line 5 \(\w+\) have the same text \(2 such") as e:
        load(train, data={"test_source": test})
    assert "classification.group_duplicates=false" in str(e.value)
    splits = load(train, data={"test_source": test}, group_duplicates=False)
    assert sizes(splits) == (36, 4, 4)
    assert any("2 of 44 texts equal an earlier one, 2 in another split" in note for note in splits.notes)


def test_the_books_protocol_gives_the_books_counts(named_data):
    splits = load("named:sms-spam", 123, balance="downsample", split="random", group_duplicates=False)
    assert splits.classes == ("ham", "spam")
    assert sizes(splits) == (1045, 149, 300)
    assert Counter(label for _, label in everything(splits)) == {"ham": 747, "spam": 747}


def test_the_notebooks_reviews_are_balanced_and_no_length_tells_their_classes_apart():
    file = Path(__file__).parents[2] / "notebooks" / "data" / "sentiment.jsonl"
    splits = load(f"jsonl:{file}")
    assert (splits.classes, sizes(splits)) == (("negative", "positive"), (168, 24, 48))
    reviews = everything(splits)
    assert Counter(label for _, label in reviews) == {"positive": 120, "negative": 120}
    assert len({text.lower() for text, _ in reviews}) == 240
    assert all(20 <= len(text) <= 120 for text, _ in reviews)
    for limit in range(20, 120):
        told = sum((len(text) > limit) == (label == "positive") for text, label in reviews)
        assert abs(told / 240 - 0.5) < 0.1


# Mistakes


GOOD = [("text", "label"), *numbered(a=10, b=10)]


@pytest.mark.real_world
@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([("message", "label"), ("x", "a")], {}, r"line 2: no field 'text', only message, label; set"),
        (GOOD, {"label_column": "kind"}, r"line 2: no field 'kind', .*; set classification\.label_column"),
        ([*GOOD, (" ", "a")], {}, "line 22: text is empty"),
        ([*GOOD, ("x", "")], {}, "line 22: label is ''; expected text"),
        ([("text", "label"), *numbered(a=10)], {}, r"one class only \('a'\)"),
        ([*GOOD, ("x", "c")], {"split": "random"}, r"class 'c' has no training text"),
        ([("text", "label"), *numbered(a=2, b=2)], {}, "the validation split is empty"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_named(tmp_path, rows, settings, expected):
    path = tmp_path / "rows.csv"
    path.write_text("".join(f"{a},{b}\n" for a, b in rows))
    with refused(expected):
        load(f"csv:{path}", **settings)


def test_labels_of_other_types_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for value in ("null", "0.5"):
        path.write_text(f'{{"text": "a", "label": {value}}}')
        with refused(r"rows.jsonl line 1: label is .*; expected text, a whole number, true or false"):
            load(f"jsonl:{path}")


def test_a_label_never_seen_in_training_is_named(tmp_path):
    train = write(tmp_path / "train.csv", numbered(a=20, b=20))
    other = write(tmp_path / "other.csv", [("x", "a"), ("y", "c")])
    with refused(r"other.csv line 3: label 'c' of the test split never .*expected one of a, b"):
        load(train, data={"test_source": other})
    with refused(r"classification.columns names the columns of csv: and tsv: files"):
        load("builtin:prose-or-code", columns=("text", "label"))


# Batches


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
        ids = encoded[i] if i >= 0 else []
        assert length == len(ids)
        np.testing.assert_array_equal(inputs[:length], ids)
        assert not inputs[length:].any()
        assert label == (labels[i] if i >= 0 else 0)
    assert {key: value.dtype.name for key, value in batch.items()} == {
        "inputs": "int32", "lengths": "int32", "labels": "int32", "weights": "float32"
    }  # fmt: skip
    return rows


def test_texts_longer_than_the_limit_are_cut_at_the_end_and_counted():
    tokenizer = CharTokenizer().build_vocab("abc")
    encoded, n_truncated = encode_texts(["abcabc", "ab", "abc"], tokenizer, 3)
    assert [tokenizer.decode(ids) for ids in encoded] == ["abc", "ab", "abc"]
    assert n_truncated == 1
    with refused("^text '' has no token"):
        encode_texts(["a", ""], tokenizer, 3)
    with refused("^b.csv line 3: text 'Z': character"):
        encode_texts(["a", "Z"], tokenizer, 3, ["b.csv line 2", "b.csv line 3"])
    with refused(r"^text '(aZ){29}a: character 'Z' at offset 1 is not in the vocabulary"):
        encode_texts(["aZ" * 99], tokenizer, 3)


def test_a_batch_is_as_wide_as_its_own_longest_text_or_as_it_was_told():
    encoded = texts(3, 30)
    labels, weights = labelled(encoded)
    free = classification_batches(encoded, labels, weights, batch_size=1, limit=64, bucketed=True, seed=0)
    assert {free[i]["inputs"].shape for i in range(4)} == {(1, 16), (1, 32)}
    fixed = classification_batches(encoded, labels, weights, batch_size=1, limit=30, bucketed=False, seed=0)
    assert {fixed[i]["inputs"].shape for i in range(4)} == {(1, 30)}
    both = classification_batches(encoded, labels, weights, batch_size=2, limit=64, bucketed=True, seed=0)
    hosts = [both.of_rows(np.array([row]))[0] for row in range(2)]
    for name, value in both[0].items():  # each host's row is as wide as the longest of all
        np.testing.assert_array_equal(value, np.concatenate([host[name] for host in hosts]))


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
