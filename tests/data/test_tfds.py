"""What must hold of TensorFlow Datasets: prepared ones are read as JSON would be, and what is missing is named soon."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prepared import build
from refusals import refused
from sharing import make_once

from slm_jax.data import beam
from slm_jax.data import tfds as module
from slm_jax.data.config import ClassificationConfig, DataConfig
from slm_jax.data.instructions import read_examples
from slm_jax.data.labelled import load_labelled
from slm_jax.data.sources import parse_source
from slm_jax.data.templates import Message
from slm_jax.errors import MissingInputError

tfds = pytest.importorskip("tensorflow_datasets")
TEXT = tfds.features.Text()


def build_all(folder: Path) -> None:
    tales = {
        "train": [{"tale": f"Zoë {i}", "stars": i} for i in range(5)],
        "validation": [{"tale": f"v{i}", "stars": i} for i in range(2)],
    }
    build(folder, "our_tales", {"tale": TEXT, "stars": np.int32}, tales)
    news = {"train": [{"title": f"T{i}", "text": f"a{i}"} for i in "12"]}
    build(folder, "our_news", {"title": TEXT, "text": TEXT}, news)
    build(folder, "our_quiz", {"question": TEXT, "answer": TEXT}, {"train": [{"question": "q", "answer": "a"}]})
    build(folder, "our_stars", {"stars": np.int32}, {"train": [{"stars": 1}]})
    label = tfds.features.ClassLabel(names=["negative", "neutral", "positive"])
    reviews = {
        split: [
            {"sentence": f"Zoë {split} {i}", "label": -1 if split == "test" else i % 3, "stars": i % 3 + 1}
            for i in range(n)
        ]
        for split, n in (("train", 30), ("validation", 6), ("test", 3))
    }
    build(folder, "our_reviews", {"sentence": TEXT, "label": label, "stars": np.int32}, reviews)
    dolly = [
        {"instruction": "Sum up.", "context": "Long — text.", "response": "Text.", "category": "summarization"},
        {"instruction": "Say yes.", "context": "", "response": "Yes.", "category": "open_qa"},
    ]
    build(folder, "our_dolly", dict.fromkeys(dolly[0], TEXT), {"train": dolly})
    endings = {"context": TEXT, "endings": tfds.features.Sequence(TEXT), "label": np.int32}
    build(folder, "our_endings", endings, {"test": [{"context": "A. b", "endings": ["é", "g"], "label": 1}]})


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    return make_once(tmp_path_factory, "tfds_catalogue", build_all)


@pytest.fixture
def folder(catalogue, monkeypatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(catalogue))
    return catalogue


def texts(source: str, column: str | None = None) -> list[str]:
    return sorted("".join(pieces) for pieces in parse_source(source).texts(column))


def test_the_workers_of_beam_read_ranges(folder, monkeypatch):
    monkeypatch.setattr(beam, "TFDS_ROWS", 2)
    units = beam.units_of([parse_source("tfds:our_tales"), parse_source("tfds:our_tales:train[:1]")])
    assert units == [f"tfds:our_tales:train[{at}]" for at in ("0:2", "2:4", "4:5", ":1")]
    assert sorted(text for unit in units[:3] for text in texts(unit)) == texts("tfds:our_tales")


def test_a_text_feature_is_found_or_chosen(folder):
    assert texts("tfds:our_tales") == [f"Zoë {i}" for i in range(5)]  # the only one
    assert texts("tfds:our_tales:validation") == ["v0", "v1"]
    assert len(texts("tfds:our_tales:train[:3]+validation")) == 5
    assert texts("tfds:our_news") == ["a1", "a2"]  # text
    assert texts("tfds:our_news", "title") == ["T1", "T2"]
    assert texts("tfds:our_quiz", "answer") == ["a"]


def test_rows_are_what_json_would_hold(folder):
    (row,) = parse_source("tfds:our_endings", split="test").read_rows()
    assert row.fields == {"context": "A. b", "endings": ["é", "g"], "label": 1}
    assert json.loads(json.dumps(row.fields)) == row.fields
    assert row.where == "tfds:our_endings:test example 0"


@pytest.mark.parametrize(
    ("source", "column", "expected"),
    [
        ("tfds:our_quiz", None, "tfds:our_quiz: its text features are .*question.*; set text_column to one of them"),
        ("tfds:our_stars", None, "tfds:our_stars: its text features are none"),
        ("tfds:our_tales", "tail", r"no field 'tail' \(did you mean tale\?\), only tale; set text_column"),
        ("tfds:our_tales", "stars", "no field 'stars', only tale"),
        ("tfds:our_tales:test", None, "tfds:our_tales:test: Unknown split 'test'.*train.*validation"),
    ],
)
def test_mistakes_say_what_exists(folder, source, column, expected):
    with refused(expected):
        texts(source, column)


def load(source, data=None, **settings):
    return load_labelled(DataConfig(source=source, **(data or {})), ClassificationConfig(**settings), 0)


def test_labelled_texts_have_the_classes_that_the_data_set_names(folder):
    splits = load("tfds:our_reviews", {"validation_source": "tfds:our_reviews:validation"})
    assert splits.classes == ("negative", "neutral", "positive")
    assert [len(split.texts) for split in (splits.train, splits.validation, splits.test)] == [24, 6, 6]
    for split in (splits.train, splits.validation, splits.test):
        for text, label in zip(split.texts, split.labels, strict=True):
            assert int(text.split()[2]) % 3 == label
    stars = load("tfds:our_reviews:train[:12]+validation", label_column="stars")
    assert stars.classes == ("1", "2", "3")


def test_secret_labels_and_missing_columns_are_named(folder):
    with refused(r"tfds:our_reviews:test example 0: label is -1; expected a class, 0 to 2"):
        load("tfds:our_reviews", {"test_source": "tfds:our_reviews:test"})
    with refused(r"train example 0: no field 'review', only .*sentence.*; set classification.text_column"):
        load("tfds:our_reviews", text_column="review")


def test_dollys_fields_are_instructions(folder):
    examples = read_examples("tfds:our_dolly")
    assert {example.messages for example in examples} == {
        (Message("user", "Sum up.", "Long — text."), Message("assistant", "Text.")),
        (Message("user", "Say yes."), Message("assistant", "Yes.")),
    }
    assert examples[1].where == "tfds:our_dolly:train example 1"


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data.replace(b"Zo", b"xx"), lambda data: b""]
)
def test_a_damaged_data_set_is_refused(folder, tmp_path, monkeypatch, damage):
    shutil.copytree(folder / "our_tales", tmp_path / "our_tales")
    (shard,) = tmp_path.glob("our_tales/1.0.0/*train*")
    damaged = damage(shard.read_bytes())
    assert damaged != shard.read_bytes()
    shard.write_bytes(damaged)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with refused(r"^tfds:our_tales:train"):
        texts("tfds:our_tales")


def test_a_data_set_that_only_tensorflow_reads_is_refused(folder, tmp_path, monkeypatch):
    copied = tmp_path / "our_tales" / "1.0.0"
    copied.mkdir(parents=True)
    for file in (folder / "our_tales" / "1.0.0").iterdir():
        content = file.read_bytes().replace(b'"fileFormat": "array_record"', b'"fileFormat": "tfrecord"')
        (copied / file.name.replace("array_record", "tfrecord")).write_bytes(content)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with refused(r"does not match the file formats.*expected array records", MissingInputError):
        texts("tfds:our_tales")


# Data sets that are not prepared


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glue/sst2", "a connection to "),
        ("lambada", "a connection to "),
        ("wikipedia/20230601.en", r"only Apache Beam can prepare it.*array_record"),
        ("imdb_review", "did you mean imdb_reviews"),
        ("wikipedai", "did you mean .*wikipedia"),  # an old-style builder, which the list of names lacks at first
        ("glue/sst", "no such configuration; expected one of cola, sst2"),
        ("../x", "failed"),
    ],
)
def test_what_cannot_be_prepared_is_named_at_once_and_leaves_nothing(offline, name, expected):
    start = time.monotonic()
    with refused(f"^tfds:{name}: .*{expected}", MissingInputError):
        parse_source(f"tfds:{name}").read_rows()
    assert time.monotonic() - start < 5
    assert list(offline.iterdir()) == []


def test_a_data_set_that_only_tensorflow_can_prepare_is_refused(monkeypatch):
    def download_and_prepare():
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr(module, "check_reachable", lambda url, seconds: None)
    builder = SimpleNamespace(url_infos={}, download_and_prepare=download_and_prepare)
    with refused(r"^tfds:our_old_tales: only TensorFlow can prepare it", MissingInputError):
        module._prepare(builder, "our_old_tales")
