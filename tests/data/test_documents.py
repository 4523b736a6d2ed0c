"""What must hold of documents: the same as if each source were read whole, in pieces that stay small."""

import gzip
import importlib
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.data import documents as module
from slm_jax.data import rows, text_files
from slm_jax.data.corpus import split_at_end_of_text
from slm_jax.data.documents import documents, read_documents, source_bytes
from slm_jax.data.named import named_file
from slm_jax.errors import InputError, MissingInputError

MARK = "<|endoftext|>"


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 900
    return text


def texts(source: str, text_column: str | None = None) -> list[str]:
    """The documents, read in pieces, after it was made sure that reading whole gives the same."""
    found = ["".join(document) for document in documents(source, text_column)]
    assert found == split_at_end_of_text(read_documents(source, text_column))
    return found


# Text


@given(
    st.lists(st.sampled_from([MARK, "<|", "<|endof", "text|>", "<", ">", "a", "é", " ", "\n", "\x1c", "\ufeff"])),
    st.integers(1, 5),
)
def test_marks_separate_documents_wherever_a_piece_ends(parts, size):
    text = "".join(parts)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = [list(document) for document in module._split(pieces)]
    assert ["".join(document) for document in found] == split_at_end_of_text([text])
    assert [["".join(document) for document in module._split([text])]] == [split_at_end_of_text([text])]


def test_a_document_that_nobody_reads_is_passed_over():
    parts = ["a", f"b{MARK[:4]}", f"{MARK[4:]}c", f"d{MARK}", f"  {MARK}e"]
    assert ["".join(d) for i, d in enumerate(module._split(parts)) if i != 1] == ["ab", "e"]
    assert [next(d) for d in module._split(parts)] == ["a", "c", "e"]


def test_files_are_sorted_split_and_decompressed(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 5)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text(" \n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(f"two\r\n{MARK}three{MARK}\n{MARK}".encode()))
    with pa.CompressedOutputStream(str(tmp_path / "d.txt.zst"), "zstd") as stream:
        stream.write("vier ü".encode())
    (tmp_path / "a.txt").write_text("one")
    assert texts(f"text:{tmp_path}/**/*.txt*") == ["one", "two\n", "three", "vier ü"]
    assert texts(f"text:{tmp_path}/*.gz") == ["two\n", "three"]


def test_a_large_file_is_never_in_memory_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("words and more words\n" * 200_000)
    told = []
    (document,) = (list(document) for document in documents(f"text:{path}", told=told.append))
    assert max(map(len, document)) <= 1 << 20
    assert sum(told) == path.stat().st_size == source_bytes(f"text:{path}")


@pytest.mark.parametrize("source", ["text:{}/*.txt", "jsonl:{}/*.jsonl", "parquet:{}/*.parquet"])
def test_no_text_at_all_is_an_error(tmp_path, source):
    (tmp_path / "a.txt").write_text(f" \n{MARK}\t")
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    pq.write_table(pa.table({"text": pa.array(["", None])}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="empty text") as error:
        list(documents(source.format(tmp_path)))
    assert str(tmp_path) in message(error)


# JSON Lines


def test_rows_of_json_lines_are_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 7)
    rows = [
        {"text": "one\r\ntwo", "body": "1"},
        {"text": f"a{MARK}b", "body": "2"},
        {"text": "", "body": " "},
        {"text": None, "body": None},
        {"text": "ü\u2028", "body": "3"},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four", "body": ""}\n'))
    expected = ["one\r\ntwo", "a", "b", "ü\u2028", "four"]
    assert texts(f"jsonl:{tmp_path}/*.jsonl*") == expected
    assert texts(f"jsonl:{tmp_path}/a.jsonl", "body") == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"txt": "a", "id": 1}', r"line 3: no text column 'text' \(did you mean txt\?\) but txt, id; set text_column"),
        ('{"text": 5}', "line 3: text is 5; expected text"),
        ('{"text": "\\ud800"}', "line 3: text has half a surrogate pair"),
        ("{", "line 3: not JSON"),
        ('["a"]', "line 3: .* is no JSON object"),
    ],
)
def test_mistakes_in_json_lines_are_named_by_line(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n\n{line}\n')
    found = documents(f"jsonl:{path}")
    assert list(next(found)) == ["one"]
    with pytest.raises(InputError, match=f"a.jsonl {expected}") as error:
        next(found)
    message(error)


# Parquet


def test_rows_of_parquet_are_documents(tmp_path):
    rows = ["one", None, "", f"two{MARK}three", "ü" * 5] + [f"row {i}" for i in range(300)]
    expected = ["one", "two", "three", "ü" * 5] + [f"row {i}" for i in range(300)]
    kinds = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
    for i, kind in enumerate(kinds):
        column = pa.array(rows).cast(kind) if i < 3 else pa.array(rows).dictionary_encode()
        table = pa.table({"body": column, "text": pa.array(rows), "n": range(len(rows))})
        pq.write_table(table, tmp_path / f"{i}.parquet", row_group_size=100)
    told = []
    found = ["".join(document) for document in documents(f"parquet:{tmp_path}/*.parquet", "body", told.append)]
    assert found == expected * 4
    assert sum(told) == source_bytes(f"parquet:{tmp_path}/*.parquet")
    assert texts(f"parquet:{tmp_path}/0.parquet") == expected


def test_only_the_column_of_the_texts_is_read(tmp_path):
    """The other column is damaged, which nobody notices."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["one", "two"] * 50, "other": [f"SECRET{i}" for i in range(100)]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    at = data.index(b"SECRET0") - 4  # where its length stands
    path.write_bytes(data[:at] + b"\xff" * 4 + data[at + 4 :])
    assert texts(f"parquet:{path}") == ["one", "two"] * 50
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as Parquet"):
        texts(f"parquet:{path}", "other")


def test_a_column_is_found_by_its_name_not_by_the_path_of_a_field(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [{"b": "of the struct"}], "a.b": ["of the column"]}), path)
    assert texts(f"parquet:{path}", "a.b") == ["of the column"]


def test_mistakes_with_parquet_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(InputError, match=r"a\.parquet: column 'text' is there twice; rename one") as error:
        texts(f"parquet:{path}")
    message(error)
    pq.write_table(pa.table({"texts": ["a"], "n": [1]}), path)
    with pytest.raises(InputError, match=r"no text column 'text' \(did you mean texts\?\) but texts, n; set text_col"):
        texts(f"parquet:{path}")
    with pytest.raises(InputError, match=r"a\.parquet: column 'n' holds int64, expected text"):
        texts(f"parquet:{path}", "n")
    pq.write_table(pa.table({"text": [b"\xff"]}), path)
    with pytest.raises(
        InputError, match=r"a\.parquet: cannot be read as Parquet, after 0 rows .*Invalid UTF8"
    ) as error:
        texts(f"parquet:{path}")
    message(error)
    path.write_text("text\nnone of it\n")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as Parquet.*another kind of source") as error:
        texts(f"parquet:{path}")
    message(error)


# TensorFlow Datasets


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    """Data sets of our own, prepared as array records, that stand for the catalogue."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")

    def build(dataset: str, features: dict, example: dict) -> None:
        with tfds.core.registered.skip_registration():

            class Builder(tfds.core.GeneratorBasedBuilder):
                name, VERSION = dataset, tfds.core.Version("1.0.0")

                def _info(self):
                    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

                def _split_generators(self, _):
                    return {"train": self._generate_examples(5), "validation": self._generate_examples(2)}

                def _generate_examples(self, n):
                    for i in range(n):
                        yield i, {key: value(i) for key, value in example.items()}

        Builder(data_dir=folder, file_format="array_record").download_and_prepare()

    text = tfds.features.Text()
    number = {"stars": np.int32}
    build("our_tales", {"tale": text, **number}, {"tale": lambda i: f"Zoë {i}", "stars": lambda i: i})
    both = {"title": text, "text": text}
    build("our_news", both, {"title": lambda i: f"T{i}", "text": lambda i: f"a{i}{MARK}b{i}"})
    two = {"question": text, "answer": text}
    build("our_quiz", two, {"question": lambda i: f"q{i}", "answer": lambda i: f"a{i}"})
    build("our_stars", number, {"stars": lambda i: i})
    return folder


@pytest.fixture
def tfds_folder(catalogue, monkeypatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(catalogue))
    return catalogue


def test_any_text_feature_is_read(tfds_folder):
    assert sorted(texts("tfds:our_tales")) == [f"Zoë {i}" for i in range(5)]  # the only one
    assert sorted(texts("tfds:our_tales:validation")) == ["Zoë 0", "Zoë 1"]
    assert len(texts("tfds:our_tales:train[:3]+validation")) == 5
    assert sorted(texts("tfds:our_news")) == sorted([f"a{i}" for i in range(5)] + [f"b{i}" for i in range(5)])  # text
    assert sorted(texts("tfds:our_news", "title")) == [f"T{i}" for i in range(5)]
    assert sorted(texts("tfds:our_quiz", "answer")) == [f"a{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("source", "column", "expected"),
    [
        ("tfds:our_quiz", None, "tfds:our_quiz: its text features are .*question.*; set text_column to one of them"),
        ("tfds:our_stars", None, "tfds:our_stars: its text features are none"),
        ("tfds:our_tales", "tail", r"no text column 'tail' \(did you mean tale\?\) but tale; set text_column"),
        ("tfds:our_tales", "stars", "no text column 'stars' but tale"),
        ("tfds:our_tales:test", None, "tfds:our_tales:test: Unknown split 'test'.*train.*validation"),
    ],
)
def test_mistakes_with_data_sets_say_what_there_is(tfds_folder, source, column, expected):
    with pytest.raises(InputError, match=expected) as error:
        texts(source, column)
    message(error)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"Zo", b"xx"),
        lambda data: b"",
    ],
)
def test_a_damaged_data_set_is_one_line(tfds_folder, tmp_path, monkeypatch, damage):
    shutil.copytree(tfds_folder / "our_tales", tmp_path / "our_tales")
    (shard,) = tmp_path.glob("our_tales/1.0.0/*train*")
    damaged = damage(shard.read_bytes())
    assert damaged != shard.read_bytes()
    shard.write_bytes(damaged)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"^tfds:our_tales:train") as error:
        texts("tfds:our_tales")
    message(error)


def test_a_data_set_that_needs_tensorflow_to_be_read_says_so(tfds_folder, tmp_path, monkeypatch):
    copied = tmp_path / "our_tales" / "1.0.0"
    copied.mkdir(parents=True)
    for file in (tfds_folder / "our_tales" / "1.0.0").iterdir():
        content = file.read_bytes().replace(b'"fileFormat": "array_record"', b'"fileFormat": "tfrecord"')
        (copied / file.name.replace("array_record", "tfrecord")).write_bytes(content)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(MissingInputError, match=r"only TensorFlow reads .*tfrecord.*file_format=array_record") as error:
        texts("tfds:our_tales")
    message(error)


@pytest.mark.parametrize("name", ["wikipedia/20230601.en", "wiki40b/en", "natural_questions"])
def test_a_data_set_that_needs_beam_to_be_prepared_says_so_at_once(tmp_path, monkeypatch, name):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(MissingInputError, match=r"only Apache Beam can prepare it.*array_record.*parquet: or jsonl:"):
        texts(f"tfds:{name}")
    assert time.monotonic() - start < 5


def test_older_builders_are_imported_only_for_a_name_that_is_not_found_without(tfds_folder, monkeypatch):
    def imported(name):
        raise MissingInputError(f"{name} was imported")

    monkeypatch.setattr(rows, "importlib", SimpleNamespace(import_module=imported, util=importlib.util))
    assert len(texts("tfds:our_tales")) == 5
    with pytest.raises(MissingInputError, match=r"tensorflow_datasets\.text was imported"):
        texts("tfds:no_such_tales")


def test_a_data_set_that_needs_tensorflow_to_be_prepared_says_so(tmp_path, monkeypatch):
    """As nobody can download here: a builder whose preparation imports it."""
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name, VERSION = "our_old_tales", tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
                )

            def _split_generators(self, _):
                import tensorflow

                return tensorflow

            def _generate_examples(self):
                return []

    try:
        import tensorflow  # noqa: F401

        pytest.skip("TensorFlow is here")
    except ImportError:
        pass
    monkeypatch.setattr(rows, "check_reachable", lambda url, seconds: None)
    builder = Builder(data_dir=tmp_path, file_format="array_record")
    with pytest.raises(MissingInputError, match=r"^tfds:our_old_tales: only TensorFlow can prepare it") as error:
        rows._prepare_tfds(builder, "our_old_tales")
    message(error)


# Other kinds


def test_named_texts_are_documents(named_data):
    assert len(texts("named:the-verdict")) == 1
    assert texts("named:the-verdict") == [named_file("the-verdict").read_text(encoding="utf-8")]
    assert source_bytes("named:the-verdict") is None


@pytest.mark.parametrize("source", ["tokens:a.bin", "text:nowhere/*.txt", "parquet:a.parquet", "huh:a"])
def test_sources_that_are_none(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        texts(source)
    assert re.search("token ids|no file matches|no such file|no kind 'huh'", message(error))
