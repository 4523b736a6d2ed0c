"""What must hold of files: however they are cut or compressed, the same text and rows, or one line that says why."""

import gzip
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from slm_jax.data import file_sources
from slm_jax.data.file_sources import iter_text, read_text
from slm_jax.data.sources import parse_source
from slm_jax.errors import MissingInputError

TEXT = "\ufeffcafé\r\n\ttwo\n\rthree\r\r\n𝒳 und\u2028so\r"  # the mark, and every kind of line end
READ = "café\n\ttwo\n\rthree\r\n𝒳 und\u2028so\r"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.txt"


def texts(source, column=None):
    return ["".join(pieces) for pieces in parse_source(source).texts(column)]


def rows(source, *, header=(), **options):
    return parse_source(source, header=header).read_rows(**options)


def fields(found):
    return [row.fields for row in found]


def places(found):
    return [row.where.rpartition("rows.txt ")[2] for row in found]


# Text


def zst(data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


COMPRESS = {".txt": bytes, ".gz": gzip.compress, ".zst": zst}


@pytest.mark.real_world
@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_is_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT.encode()))
    for size in (1, 2, 3, 4, 5, 7, 100):
        monkeypatch.setattr(file_sources, "PIECE", size)
        pieces = list(iter_text(path))
        assert "".join(pieces) == READ
        assert all(0 < len(piece) <= size + 1 for piece in pieces)  # a held CR may join
    path.write_bytes(COMPRESS[suffix](b""))
    assert list(iter_text(path)) == []
    path.write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))  # compressed in parts
    assert read_text(path) == "one two"


def test_pieces_are_bounded_and_all_bytes_are_reported(tmp_path):
    """Also of a file that is compressed a thousandfold."""
    text = "a line of text\n" * 400_000
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a{suffix.upper()}"
        path.write_bytes(compress(text.encode()))
        reported = []
        pieces = list(iter_text(path, reported.append))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 1 << 20
        assert sum(reported) == path.stat().st_size
        assert min(reported) >= 0


def words(n: int) -> bytes:
    rng = random.Random(0)
    return b" ".join(b"%x" % rng.getrandbits(32) for _ in range(n))


@pytest.mark.hostile
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data[:10] + b"\xff" * 20 + data[30:],
        lambda data: data + b"something else",
        lambda data: words(3),
    ],
)
def test_a_damaged_compressed_file_is_one_line(tmp_path, suffix, damage):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](words(100_000))))
    with refused(r"a\.txt\.(gz|zst): truncated or damaged after"):
        read_text(path)


@pytest.mark.real_world
@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_bytes_that_are_not_utf8_are_named_in_any_piece(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    for text, expected in [
        (b"\xef\xbb\xbfone\ncaf\xe9 two", r"byte 10 \(line 2\) is 0xe9"),
        ("é\n".encode() * 50 + b"\xf0\x9f\x98", r"byte 150 \(line 51\) is 0xf0"),
        (b"a\n\n\xff", r"byte 3 \(line 3\) is 0xff"),
    ]:
        path.write_bytes(COMPRESS[suffix](text))
        for size in (1, 2, 3, 7, 1 << 20):
            monkeypatch.setattr(file_sources, "PIECE", size)
            with refused(f"not UTF-8: {expected}.*iconv"):
                read_text(path)


@pytest.mark.real_world
def test_other_encodings_and_binary_files_are_refused_early(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress("plain words".encode("utf-16")))
    with refused(r"is UTF-16, expected UTF-8.*iconv"):
        read_text(path)
    path.write_bytes(gzip.compress(bytes(5_000_000)))
    with refused("many characters are NUL; expected text"):
        read_text(path)
    path.write_bytes(gzip.compress(b"a" * 70_000_000))
    with refused("decompresses to more than 200 times its size"):
        read_text(path)
    other = tmp_path / "a.txt"
    other.write_bytes("text".encode("utf-32"))
    with refused(r"is UTF-32, expected UTF-8.*iconv"):
        read_text(other)
    for start, kind in ((b"%PDF-1.7 ", "a PDF"), (b"PK\x03\x04..", "Word"), (b"\xff\xd8\xff\xe0", "JPEG")):
        other.write_bytes(start)
        with refused(f"is .*{kind}.*; expected text in UTF-8"):
            read_text(other)


def test_each_file_is_a_text_in_the_order_of_paths(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/skip.md", "book [1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(f"text:{tmp_path}/?.txt") == ["a.txt", "b.txt"]
    assert texts(f"text:{tmp_path}/**/?.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert len(texts(f"text:{tmp_path}/**")) == 5  # folders match `**`, too, and are skipped
    assert texts(f"text:{tmp_path}/book [1].txt") == ["book [1].txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert texts("text:~/a.txt") == texts("text:~/a*.txt") == texts("text:a.txt") == ["a.txt"]


@pytest.mark.parametrize("rest", ["nothing.txt", "no*.txt", "nowhere/**/*.txt", "link.txt"])
def test_missing_files_are_named(tmp_path, monkeypatch, rest):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    with refused(rf"{re.escape(rest)}.*{tmp_path}", MissingInputError):
        texts(f"text:{rest}")


def test_folders_and_unreadable_files_are_named(tmp_path, monkeypatch):
    with refused(r"is a folder; expected files, such as .*\*\*"):
        texts(f"text:{tmp_path}")
    with refused("File name too long"):
        texts("text:" + "x" * 300)
    (tmp_path / "a.txt").write_text("secret")

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so no real file will do
    with refused(r"a\.txt: cannot be read: Permission denied"):
        texts(f"text:{tmp_path}/a.txt")


# JSON


def test_a_line_is_an_object_and_empty_lines_are_skipped(path, monkeypatch):
    monkeypatch.setattr(file_sources, "PIECE", 7)
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n  \n{"text": "\xc3\xa9", "n": [1]}\nnot JSON')
    found = rows(f"jsonl:{path}", limit=2)  # which leaves the rest unread
    assert fields(found) == [{"text": "a\u2028b"}, {"text": "é", "n": [1]}]
    assert places(found) == ["line 1", "line 4"]


def test_files_follow_each_other_and_null_is_empty_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\r\\ntwo", "body": "1"}\n{"text": null, "body": "2"}')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four", "body": "3"}\n'))
    assert texts(f"jsonl:{tmp_path}/*.jsonl*") == ["one\r\ntwo", "", "four"]
    assert texts(f"jsonl:{tmp_path}/*.jsonl*", "body") == ["1", "2", "3"]


def test_a_json_file_is_a_list_of_objects(path):
    path.write_text('\ufeff[{"a": 1},\n {"a": [2]}]\n', encoding="utf-8")
    found = rows(f"json:{path}")
    assert fields(found) == [{"a": 1}, {"a": [2]}]
    assert places(found) == ["entry 1", "entry 2"]


@pytest.mark.real_world
@pytest.mark.parametrize(
    ("scheme", "content", "expected"),
    [
        ("jsonl", b'{"text": ""}\n\n{"a": }', r"line 3: not JSON \(Expecting value.*\): '{\"a\": }'"),
        ("jsonl", b'{"a": 1, "a": 1}', "line 1: .*key 'a' occurs twice"),
        ("jsonl", b"[1, 2]", r"line 1: \[1, 2\] is not a JSON object"),
        ("jsonl", b"[" * 200_000, "line 1: not JSON"),
        ("jsonl", b'\n{"t": "a", "id": 1}', r"line 2: no field 'text', only t, id; set text_column"),
        ("jsonl", b'{"text": 5}', "line 1: text is 5; expected text"),
        ("json", b'{"data": []}', r"{'data': \[\]} is not a list; expected one list of JSON objects"),
        ("json", b'[{"text": ""}, 3]', "entry 2: 3 is not a JSON object"),
        ("json", b'[{},\n{"a" 1}]', r"not JSON \(Expecting ':' delimiter: line 2 column 6"),
        ("json", b'[{"a": "caf\xe9"}]', r"not UTF-8: byte 11"),
    ],
)  # fmt: skip
def test_mistakes_in_json_are_named_by_their_place(path, scheme, content, expected):
    path.write_bytes(content)
    with refused(f"rows.txt:? ?{expected}"):
        texts(f"{scheme}:{path}")


@pytest.mark.parametrize(("scheme", "content"), [("json", "[]"), ("jsonl", "\n"), ("csv", "text\n"), ("tsv", "")])
def test_files_without_rows_and_missing_files_are_named(path, scheme, content):
    path.write_text(content)
    with refused(r"rows.txt is empty; expected at least one row"):
        rows(f"{scheme}:{path}")
    path.unlink()
    with refused("rows.txt: no such file", MissingInputError):
        rows(f"{scheme}:{path}")


# Tables


@pytest.mark.real_world
def test_quoted_fields_hold_commas_quotes_and_line_breaks(path):
    path.write_bytes(b'\xef\xbb\xbflabel,text\r\nham,"a, ""b"""\r\n\r\nspam,"c\r\nd"\r\nham,\xc3\xa9\xe2\x80\xa8\r\n')
    found = rows(f"csv:{path}")
    assert [tuple(row.fields.values()) for row in found] == [("ham", 'a, "b"'), ("spam", "c\nd"), ("ham", "é\u2028")]
    assert list(found[0].fields) == ["label", "text"]
    assert places(found) == ["line 2", "line 4", "line 6"]  # where each begins


@pytest.mark.real_world
@pytest.mark.parametrize("comma", [",", ";", "\t"])
def test_a_csv_may_be_separated_by_semicolons_or_tabs_and_have_long_cells(path, comma):
    long = "a, b; c" * 30_000
    path.write_text(f'label{comma}text\nham{comma}"{long}"\n')
    assert fields(rows(f"csv:{path}")) == [{"label": "ham", "text": long}]


@pytest.mark.real_world
def test_between_tabs_quotes_are_characters(path):
    path.write_text('label\ttext\nham\t"so he said\nham\t""\nspam\ta, b\n')
    assert texts(f"tsv:{path}") == ['"so he said', '""', "a, b"]


@pytest.mark.real_world
def test_columns_may_lack_names_or_a_header_line(path):
    """Some programs write empty columns behind the last, or an index without a name."""
    path.write_text(",text,,\n0,a,,\n")
    assert texts(f"csv:{path}") == ["a"]
    path.write_text("ham\ta\n")
    assert fields(rows(f"tsv:{path}", header=("label", "text"))) == [{"label": "ham", "text": "a"}]
    with refused("columns: column 'text' occurs twice"):
        rows(f"tsv:{path}", header=("text", "text"))


@pytest.mark.real_world
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("label,text\nham,a\nham,a,b\n", r"line 3: 3 fields, expected 2 \(label, text\)"),
        ('label,text\nham,"a\nb"\nham\n', r"line 4: 1 fields, expected 2"),
        ("text,label,text\n", r"line 1: column 'text' occurs twice"),
        ('label,text\nham,"a" b\n', "line 2: ',' expected after '\"'"),
        ('label,text\nham,a\nham,"a\nham,b\n', "line 3: unexpected end of data"),
    ],
)
def test_mistakes_in_a_table_are_named(path, content, expected):
    path.write_text(content)
    with refused(f"rows.txt {expected}"):
        rows(f"csv:{path}")


# Parquet


@pytest.mark.real_world
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


def test_only_the_column_of_the_name_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [{"b": "of the struct"}], "a.b": ["of the column"]}), path)
    assert texts(f"parquet:{path}", "a.b") == ["of the column"]
    table = pa.table({"text": ["one", "two"] * 50, "other": [f"SECRET{i}" for i in range(100)]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    at = data.index(b"SECRET0") - 4  # its length
    path.write_bytes(data[:at] + b"\xff" * 4 + data[at + 4 :])  # the other column is damaged
    assert texts(f"parquet:{path}") == ["one", "two"] * 50
    with refused(r"a\.parquet: cannot be read as Parquet"):
        texts(f"parquet:{path}", "other")


@pytest.mark.real_world
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
