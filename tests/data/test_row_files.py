"""What must hold of files of rows: read as the file has them, and mistakes named by file and place."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from slm_jax.data import text_files
from slm_jax.data.row_files import read_json_rows
from slm_jax.data.sources import parse_source
from slm_jax.errors import MissingInputError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.txt"


def rows(source, *, header=(), **options):
    return parse_source(source, header=header).read_rows(**options)


def fields(found):
    return [row.fields for row in found]


def places(found):
    return [row.where.rpartition("rows.txt ")[2] for row in found]


def texts(source, column=None):
    return ["".join(pieces) for pieces in parse_source(source).texts(column)]


# JSON Lines


def test_a_line_is_an_object_and_empty_lines_are_skipped(path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 7)
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n  \n{"text": "\xc3\xa9", "n": [1]}')
    found = rows(f"jsonl:{path}")
    assert fields(found) == [{"text": "a\u2028b"}, {"text": "é", "n": [1]}]
    assert places(found) == ["line 1", "line 4"]


def test_files_follow_each_other_and_null_is_empty_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\r\\ntwo", "body": "1"}\n{"text": null, "body": "2"}')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four", "body": "3"}\n'))
    assert texts(f"jsonl:{tmp_path}/*.jsonl*") == ["one\r\ntwo", "", "four"]
    assert texts(f"jsonl:{tmp_path}/*.jsonl*", "body") == ["1", "2", "3"]


def test_a_limit_leaves_the_rest_unread(path):
    path.write_text('{"a": 1}\n\n{"a": 2}\nnot JSON\n')
    assert fields(rows(f"jsonl:{path}", limit=2)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": }', r"line 3: not JSON \(Expecting value at column 7\): '{\"a\": }'"),
        (b"<!DOCTYPE html>", "line 3: not JSON"),
        (b"[1, 2]", r"line 3: \[1, 2\] is not a JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 3: JSON that cannot be read"),
        (b"[" * 200_000, "line 3: JSON that cannot be read"),
        (b'{"a": "\xff"}', r"not UTF-8: byte 21 \(line 3\)"),
        (b'{"txt": "a", "id": 1}', r"line 3: no field 'text' \(did you mean txt\?\), only txt, id; set text_column"),
        (b'{"text": 5}', "line 3: text is 5; expected text"),
    ],
)
def test_mistakes_in_json_lines_are_named_by_line(path, line, expected):
    path.write_bytes(b'{"text": ""}\n\n' + line)
    with refused(f"rows.txt:? ?{expected}"):
        texts(f"jsonl:{path}")


# JSON


def test_a_json_file_is_a_list_of_objects(path):
    path.write_text('\ufeff[{"a": 1},\n {"a": [2]}]\n', encoding="utf-8")
    found = rows(f"json:{path}")
    assert fields(found) == fields(read_json_rows(path)) == [{"a": 1}, {"a": [2]}]
    assert places(found) == ["entry 1", "entry 2"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"data": []}', r"{'data': \[\]} is not a list; expected one list of JSON objects"),
        ("7", "7 is not a list"),
        ("[{}, 3]", "entry 2: 3 is not a JSON object"),
        ('[{},\n{"a" 1}]', r"not JSON \(Expecting ':' delimiter at line 2, column 6\): '{\"a\" 1}\]'"),
        ('{"a": 1}\n{"a": 2}\n', r"not JSON \(Extra data at line 2, column 1\)"),
        ("", "not JSON"),
        ("[" * 200_000, "JSON that cannot be read"),
        ("[]", "is empty; expected at least one row"),
    ],
)
def test_json_that_is_not_a_list_of_objects_is_refused(path, content, expected):
    path.write_text(content)
    with refused(f"rows.txt:? ?{expected}"):
        rows(f"json:{path}")


# Tables


def test_quoted_fields_hold_commas_quotes_and_line_breaks(path):
    path.write_bytes(b'\xef\xbb\xbflabel,text\r\nham,"a, ""b"""\r\n\r\nspam,"c\r\nd"\r\nham,\xc3\xa9\xe2\x80\xa8\r\n')
    found = rows(f"csv:{path}")
    assert [tuple(row.fields.values()) for row in found] == [("ham", 'a, "b"'), ("spam", "c\nd"), ("ham", "é\u2028")]
    assert list(found[0].fields) == ["label", "text"]
    assert places(found) == ["line 2", "line 4", "line 6"]  # where each begins


def test_between_tabs_quotes_are_characters(path):
    path.write_text('label\ttext\nham\t"so he said\nham\t""\nspam\ta, b\n')
    assert texts(f"tsv:{path}") == ['"so he said', '""', "a, b"]


def test_columns_are_named_for_a_table_without_a_header_line(path):
    path.write_text("ham\ta\n")
    assert fields(rows(f"tsv:{path}", header=("label", "text"))) == [{"label": "ham", "text": "a"}]
    with refused("columns: column 'text' occurs twice"):
        rows(f"tsv:{path}", header=("text", "text"))
    with refused("is empty; expected at least one row"):
        rows(f"tsv:{path}")


def test_columns_may_lack_names(path):
    """Some programs write empty columns behind the last, or an index without a name."""
    path.write_text(",text,,\n0,a,,\n")
    assert texts(f"csv:{path}") == ["a"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("label,text\nham,a\nham,a,b\n", r"line 3: 3 fields, expected 2 \(label, text\)"),
        ('label,text\nham,"a\nb"\nham\n', r"line 4: 1 fields, expected 2"),
        ("text,label,text\n", r"line 1: column 'text' occurs twice"),
        ('label,text\nham,"a" b\n', "line 2: ',' expected after '\"'"),
        ('label,text\nham,a\nham,"a\nham,b\n', "line 3: unexpected end of data"),
        ("label,text\nham," + "a" * 200_000, "line 2: field larger than field limit"),
    ],
)
def test_mistakes_in_a_table_are_named(path, content, expected):
    path.write_text(content)
    with refused(f"rows.txt {expected}"):
        rows(f"csv:{path}")


@pytest.mark.parametrize("scheme", ["jsonl", "json", "csv", "tsv"])
def test_files_that_are_not_text_are_named(path, scheme):
    path.write_bytes(b'{"a": "caf\xe9"}')
    with refused("rows.txt: not UTF-8: byte 10"):
        rows(f"{scheme}:{path}")
    path.unlink()
    with refused("rows.txt: no such file", MissingInputError):
        rows(f"{scheme}:{path}")


# Parquet


def test_rows_of_parquet_are_read_whatever_type_text_has(tmp_path):
    expected = ["one", None, "", "ü" * 5] + [f"row {i}" for i in range(300)]
    kinds = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
    for i, kind in enumerate(kinds):
        column = pa.array(expected).cast(kind) if i < 3 else pa.array(expected).dictionary_encode()
        table = pa.table({"body": column, "n": range(len(expected))})
        pq.write_table(table, tmp_path / f"{i}.parquet", row_group_size=100)
    source = parse_source(f"parquet:{tmp_path}/*.parquet")
    read = []
    assert ["".join(pieces) for pieces in source.texts("body", read.append)] == [text or "" for text in expected] * 4
    assert sum(read) == sum(path.stat().st_size for path in source.files())
    found = rows(f"parquet:{tmp_path}/0.parquet")
    assert fields(found)[:2] == [{"body": "one", "n": 0}, {"body": None, "n": 1}]
    assert found[99].where.endswith("0.parquet row 100")


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    """The other column is damaged, which goes unnoticed."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["one", "two"] * 50, "other": [f"SECRET{i}" for i in range(100)]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    at = data.index(b"SECRET0") - 4  # its length
    path.write_bytes(data[:at] + b"\xff" * 4 + data[at + 4 :])
    assert texts(f"parquet:{path}") == ["one", "two"] * 50
    with refused(r"a\.parquet: cannot be read as Parquet"):
        texts(f"parquet:{path}", "other")


def test_a_column_is_found_by_its_name_not_by_the_path_of_a_field(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [{"b": "of the struct"}], "a.b": ["of the column"]}), path)
    assert texts(f"parquet:{path}", "a.b") == ["of the column"]


@pytest.mark.parametrize(
    ("table", "column", "expected"),
    [
        (pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), None, "'text' occurs twice"),
        (pa.table({"texts": ["a"], "n": [1]}), None, r"no field 'text' \(did you mean texts\?\), only texts, n"),
        (pa.table({"texts": ["a"], "n": [1]}), "n", "row 1: n is 1; expected text"),
        (pa.table({"text": [b"\xff"]}), None, "cannot be read as Parquet after 0 rows .*Invalid UTF8"),
        (None, None, "cannot be read as Parquet"),
    ],
)
def test_mistakes_with_parquet_are_named(tmp_path, table, column, expected):
    path = tmp_path / "a.parquet"
    path.write_text("text\nnone of it\n")
    if table is not None:
        pq.write_table(table, path)
    with refused(rf"a\.parquet:? .*{expected}"):
        texts(f"parquet:{path}", column)
