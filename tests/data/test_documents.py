"""What must hold of documents: the same as if each source were read whole, in pieces that stay small."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from slm_jax.data import documents as module
from slm_jax.data import text_files
from slm_jax.data.documents import documents, read_documents
from slm_jax.data.named import named_file
from slm_jax.data.sources import parse_source

MARK = "<|endoftext|>"


def whole(text: str) -> list[str]:
    """The documents of a text, found by reading it whole."""
    return [document for document in text.split(MARK) if document.strip()]


@given(
    st.lists(st.sampled_from([MARK, "<|", "<|endof", "text|>", "<", ">", "a", "é", " ", "\n", "\x1c", "\ufeff"])),
    st.integers(1, 5),
)
def test_marks_separate_documents_wherever_a_piece_ends(parts, size):
    text = "".join(parts)
    for pieces in ([text[i : i + size] for i in range(0, len(text), size)], [text]):
        assert ["".join(document) for document in module._split(pieces)] == whole(text)


def test_a_document_that_is_not_read_is_skipped():
    parts = ["a", f"b{MARK[:4]}", f"{MARK[4:]}c", f"d{MARK}", f"  {MARK}e"]
    assert ["".join(d) for i, d in enumerate(module._split(parts)) if i != 1] == ["ab", "e"]
    assert [next(d) for d in module._split(parts)] == ["a", "c", "e"]


def test_files_and_rows_are_split_and_empty_ones_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 5)
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
        found = documents(parse_source(source), on_empty=lambda empty=empty: empty.append(1))
        assert ["".join(document) for document in found] == read_documents(parse_source(source)) == expected
        assert len(empty) == n_empty


def test_a_large_file_is_never_in_memory_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("words and more words\n" * 200_000)
    read = []
    (document,) = (list(document) for document in documents(parse_source(f"text:{path}"), on_read=read.append))
    assert max(map(len, document)) <= 1 << 20
    assert sum(read) == path.stat().st_size


@pytest.mark.parametrize("source", ["text:{}/*.txt", "jsonl:{}/*.jsonl", "parquet:{}/*.parquet"])
def test_no_text_at_all_is_an_error(tmp_path, source):
    (tmp_path / "a.txt").write_text(f" \n{MARK}\t")
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    pq.write_table(pa.table({"text": pa.array(["", None])}), tmp_path / "a.parquet")
    with refused(f"{tmp_path}.*empty text"):
        read_documents(parse_source(source.format(tmp_path)))


def test_named_texts_are_documents(named_data):
    text = named_file("the-verdict").read_text(encoding="utf-8")
    assert read_documents(parse_source("named:the-verdict")) == [text]
