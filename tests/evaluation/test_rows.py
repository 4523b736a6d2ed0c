"""What must hold of a benchmark's examples: as the file or the data set has them, mistakes named by line."""

import json
import time

import numpy as np
import pytest

from slm_jax.errors import InputError, MissingInputError
from slm_jax.evaluation.rows import read_rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def fields(rows):
    return [row.fields for row in rows]


# JSON Lines


def test_a_limit_leaves_the_rest_unread(path):
    path.write_text('{"a": 1}\n\n{"a": 2}\nnot JSON\n')
    assert fields(read_rows(f"jsonl:{path}", "lambada", 2)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rows.jsonl: empty; expected at least one example"),
        (b"\n \n", "rows.jsonl: empty"),
        (b'{"a": 1}\n{"a": }', r"line 2: not JSON \(Expecting value at column 7\): '{\"a\": }'"),
        (b"<!DOCTYPE html>", "line 1: not JSON"),
        (b"[1, 2]", r"line 1: '\[1, 2\]' is no JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: JSON that cannot be read"),
        (b"[" * 200_000, "line 1: JSON that cannot be read"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7"),
    ],
)
def test_mistakes_in_a_file_are_named(path, content, message):
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_rows(f"jsonl:{path}", "lambada", None)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_file_that_is_not_there_or_no_file_is_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"absent.jsonl: no such file \(looked from"):
        read_rows(f"jsonl:{tmp_path / 'absent.jsonl'}", "lambada", None)
    with pytest.raises(InputError, match="is a folder, expected a file"):
        read_rows(f"jsonl:{tmp_path}", "lambada", None)


@pytest.mark.parametrize("source", ["rows.jsonl", "jsonl:", "text:a.txt", "tfds:hellaswag", "tfds:", "tfds:lambada2"])
def test_sources_of_another_kind_are_refused(source):
    with pytest.raises(InputError, match="expected jsonl:FILE, tfds:lambada or tfds:lambada:SPLIT"):
        read_rows(source, "lambada", None)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_nothing_is_refused(path, limit):
    path.write_text("{}")
    with pytest.raises(InputError, match=f"limit is {limit}; expected at least 1"):
        read_rows(f"jsonl:{path}", "lambada", limit)


# TensorFlow Datasets


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Data sets under the real names, written as TensorFlow Datasets writes them."""
    tfds = pytest.importorskip("tensorflow_datasets")
    text = tfds.features.Text()
    more = {"source_id": text, "split_type": text}
    roof = {"context": "A. b", "activity_label": "Roof", "source_id": "activitynet~1", "split_type": "indomain"}
    contents = {
        "lambada": ("1.0.0", {"passage": text}, {"test": [{"passage": f"Zoë says {i}\n"} for i in range(3)]}),
        "hellaswag": (
            "1.1.0",
            {
                "context": text,
                "endings": tfds.features.Sequence(text),
                "activity_label": text,
                "label": np.int32,
                **more,
            },
            {
                "validation": [{**roof, "endings": ["é", "g"], "label": 1}],
                "test": [{**roof, "endings": ["f", "g"], "label": -1}],
            },
        ),
    }
    for dataset, (version, features, splits) in contents.items():
        with tfds.core.registered.skip_registration():

            class Builder(tfds.core.GeneratorBasedBuilder):
                name, VERSION = dataset, tfds.core.Version(version)

                def _info(self, features=features):
                    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

                def _split_generators(self, _, splits=splits):
                    return {split: self._generate_examples(rows) for split, rows in splits.items()}

                def _generate_examples(self, rows):
                    yield from enumerate(rows)

        Builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))


def test_prepared_data_sets_give_what_json_would(prepared):
    rows = read_rows("tfds:lambada", "lambada", None)
    assert sorted(row.fields["text"] for row in rows) == ["Zoë says 0\n", "Zoë says 1\n", "Zoë says 2\n"]
    assert fields(read_rows("tfds:lambada:test", "lambada", 2)) == fields(rows[:2])
    (row,) = read_rows("tfds:hellaswag", "hellaswag", None)
    assert {"ctx": "A. b", "endings": ["é", "g"], "activity_label": "Roof", "label": 1}.items() <= row.fields.items()
    assert json.loads(json.dumps(row.fields)) == row.fields
    assert read_rows("tfds:hellaswag:test", "hellaswag", None)[0].where == "tfds:hellaswag:test example 0"


def test_a_split_that_is_not_there_is_named(prepared):
    with pytest.raises(MissingInputError, match="tfds:lambada:nope: Unknown split 'nope'"):
        read_rows("tfds:lambada:nope", "lambada", None)


@pytest.mark.parametrize("benchmark", ["lambada", "hellaswag"])
def test_without_a_network_it_says_so_at_once_and_leaves_nothing(tmp_path, monkeypatch, benchmark):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    start = time.monotonic()
    with pytest.raises(MissingInputError, match=f"tfds:{benchmark}.*or use jsonl:FILE") as error:
        read_rows(f"tfds:{benchmark}", benchmark, None)
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
