"""What must hold of sources: one registry, rows and documents for every consumer, and mistakes that are named."""

import gzip
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from slm_jax.data import file_sources
from slm_jax.data.config import ClassificationConfig, DataConfig, InstructionConfig, TokenizerConfig
from slm_jax.data.corpus import load_corpus
from slm_jax.data.instructions import load_instructions
from slm_jax.data.labelled import load_labelled
from slm_jax.data.rows import Row, Source, ignore_bytes
from slm_jax.data.sources import SOURCES, check_text_column, parse_source

MARK = "<|endoftext|>"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("mytext.txt", "did you mean text:mytext.txt"),
        ("data/train.bin", "did you mean tokens:data/train.bin"),
        ("tinyshakespeare", "did you mean named:tinyshakespeare"),
        ("C:\\books\\a.txt", r"did you mean text:C:\\"),
        ("Jsno:a.json", r"unknown scheme 'Jsno' \(did you mean json\?\); expected one of builtin:NAME, text:GLOB"),
        ("text:", "no name; expected text:GLOB"),
        ("named:tiny-shakespeare", r"did you mean tinyshakespeare\?\); expected one of the-verdict, tinysh"),
        ("builtin:nothing", "no such data set; expected one of python-docs, prose-or-code"),
    ],
)
def test_a_wrong_source_is_named_with_the_right_one(source, expected):
    with refused(expected):
        parse_source(source)


def test_a_new_source_is_a_class_and_its_entry_in_the_registry(monkeypatch):
    """All consumers then understand it."""

    class Numbers(Source):
        scheme, form = "numbers", "numbers:N"

        def rows(self, columns=(), on_read=ignore_bytes):
            fields = ({"text": f"text {i}", "label": i % 2, "instruction": f"{i}?", "output": "!"} for i in range(30))
            return (Row(f"{self} {i}", row) for i, row in enumerate(fields))

    monkeypatch.setitem(SOURCES, "numbers", Numbers)
    data = DataConfig(source="numbers:30")
    assert parse_source(data.source).read_documents("output") == ["!"] * 30
    assert load_corpus(data, TokenizerConfig(kind="simple")).train.size > 50
    assert load_labelled(data, ClassificationConfig(), 0).classes == ("0", "1")
    assert len(load_instructions(data, InstructionConfig(), 0).train) == 21


def test_what_has_no_fields_or_no_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    for source in (f"text:{tmp_path}/a.txt", "tokens:a.bin"):
        with refused("no named fields; expected rows"):
            parse_source(source).read_rows()
        with refused("text_column is 'body', but .* has no columns"):
            check_text_column("body", [parse_source(source)])
    with refused("holds token ids, expected text"):
        parse_source("tokens:a.bin").texts()
    check_text_column("body", [parse_source("text:a.txt"), parse_source("jsonl:a.jsonl")])
    check_text_column(None, [parse_source("text:a.txt")])


def test_a_field_is_returned_or_named_with_those_that_exist():
    row = Row("spam.csv line 12", {"label": 1, "texts": "é \U0001f40d", "empty": " "})
    assert (row.field("label"), row.text("texts"), row.text("empty")) == (1, "é \U0001f40d", " ")
    with refused(r"spam.csv line 12: no field 'text' \(did you mean texts\?\), only label, texts, empty$"):
        row.field("text")
    with refused("only label, .*; set data.text_column to one of them"):
        row.text("body", "data.text_column")
    with refused("spam.csv line 12: label is 1; expected text"):
        row.text("label")
    with refused("line 12: empty is empty; expected text"):
        row.filled("empty")
    with refused("a: text has half a surrogate pair"):
        Row("a", {"text": "ab\udfff"}).text("text")


def test_reading_text_imports_neither_flax_nor_what_other_sources_need():
    code = (
        "import json, sys, slm_jax.data.corpus\n"
        "heavy = ('flax', 'jax', 'pyarrow', 'tensorflow_datasets', 'grain', 'requests', 'tiktoken', 'tokenizers')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))\n"
        "import slm_jax.data.prepare, slm_jax.data.labelled, slm_jax.data.instructions\n"
        "print(json.dumps([name for name in ('flax', 'pyarrow') if name in sys.modules]))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in found.splitlines()] == [[], []]


# Documents


class Pieces(Source):
    """One text in given pieces."""

    scheme, has_rows = "pieces", False

    def __init__(self, pieces):
        super().__init__("")
        self.pieces = pieces

    def texts(self, column=None, on_read=ignore_bytes):
        return iter([self.pieces])


@given(
    st.lists(st.sampled_from([MARK, "<|", "<|endof", "text|>", "<", ">", "a", "é", " ", "\n", "\x1c", "\ufeff"])),
    st.integers(1, 5),
)
def test_marks_separate_documents_wherever_a_piece_ends(parts, size):
    text = "a" + "".join(parts)
    whole = [document for document in text.split(MARK) if document.strip()]
    for pieces in ([text[i : i + size] for i in range(0, len(text), size)], [text]):
        assert Pieces(pieces).read_documents() == whole


def test_a_document_that_is_not_read_is_skipped():
    source = Pieces(["a", f"b{MARK[:4]}", f"{MARK[4:]}c", f"d{MARK}", f"  {MARK}e"])
    assert ["".join(document) for i, document in enumerate(source.documents()) if i != 1] == ["ab", "e"]
    assert [next(document) for document in source.documents()] == ["a", "c", "e"]


def test_files_and_rows_are_split_and_empty_ones_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(file_sources, "PIECE", 5)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(f"two\r\n{MARK}three{MARK}\n{MARK}".encode()))
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "a.txt").write_text("one")
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "a<|endoftext|>b"}\n{"text": null}\n{"text": ""}\n{"text": " "}\n')
    for source, expected, n_empty in (
        (f"text:{tmp_path}/*.txt*", ["one", "two\n", "three"], 1),
        (f"jsonl:{rows}", ["a", "b"], 3),
    ):
        empty = []
        found = parse_source(source).documents(on_empty=lambda empty=empty: empty.append(1))
        assert ["".join(document) for document in found] == parse_source(source).read_documents() == expected
        assert len(empty) == n_empty


@pytest.mark.parametrize("source", ["text:{}/*.txt", "jsonl:{}/*.jsonl"])
def test_no_text_at_all_is_an_error(tmp_path, source):
    (tmp_path / "a.txt").write_text(f" \n{MARK}\t")
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    with refused(f"{tmp_path}.*empty text"):
        parse_source(source.format(tmp_path)).read_documents()
