"""What must hold of rows of data: as the file has them, and mistakes named by file and line."""

import time

import pytest

from slm_jax.data.rows import Row, read_json, read_jsonl, read_table, read_tfds
from slm_jax.errors import InputError, MissingInputError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.txt"


def fields(rows):
    return [row.fields for row in rows]


def places(rows):
    return [row.where.rpartition("rows.txt ")[2] for row in rows]


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


# A row


def test_a_field_that_is_not_there_is_named_with_those_that_are():
    row = Row("spam.csv line 12", {"label": 1, "message": "a"})
    assert (row.field("label"), row.text("message")) == (1, "a")
    with pytest.raises(InputError, match=r"^spam.csv line 12: no field 'text' but label, message; add it$"):
        row.text("text")


@pytest.mark.parametrize(
    ("value", "expected"), [(1, "is 1; expected text"), (None, "is None"), ("\ud800", "half a surrogate pair")]
)
def test_text_must_be_text_that_can_be_written(value, expected):
    with pytest.raises(InputError, match=rf"^a line 1: text .*{expected}"):
        Row("a line 1", {"text": value}).text("text")


# JSON Lines


def test_a_line_is_an_object_and_empty_lines_are_none(path):
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n  \n{"text": "\xc3\xa9", "n": [1]}')
    rows = read_jsonl(path)
    assert fields(rows) == [{"text": "a\u2028b"}, {"text": "é", "n": [1]}]
    assert places(rows) == ["line 1", "line 4"]


# JSON


def test_a_json_file_is_a_list_of_objects(path):
    path.write_text('\ufeff[{"a": 1},\n {"a": [2]}]\n', encoding="utf-8")
    rows = read_json(path)
    assert fields(rows) == [{"a": 1}, {"a": [2]}]
    assert places(rows) == ["entry 1", "entry 2"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"data": [], "version": 1}', "one object with data, version is no list; expected one list of JSON objects"),
        ("7", "7 is no list"),
        ("[{}, 3]", "entry 2: is a number, no JSON object"),
        ("[{}, null]", "entry 2: is null, no JSON object"),
        ('[{},\n{"a" 1}]', r"not JSON \(Expecting ':' delimiter at line 2, column 6\): '{\"a\" 1}\]'"),
        ('{"a": 1}\n{"a": 2}\n', r"not JSON \(Extra data at line 2, column 1\)"),
        ("", "not JSON"),
        ("[" * 200_000, "JSON that cannot be read"),
        ("[" + "9" * 5000 + "]", "JSON that cannot be read"),
    ],
)
def test_json_that_is_no_list_of_objects_is_refused(path, content, expected):
    path.write_text(content)
    with pytest.raises(InputError, match=f"rows.txt:? ?{expected}") as error:
        read_json(path)
    message(error)


# Tables


def test_quoted_fields_hold_commas_quotes_and_line_breaks(path):
    path.write_bytes(b'\xef\xbb\xbflabel,text\r\nham,"a, ""b"""\r\n\r\nspam,"c\r\nd"\r\nham,\xc3\xa9\xe2\x80\xa8\r\n')
    rows = read_table(path, ",")
    assert fields(rows) == [
        {"label": "ham", "text": 'a, "b"'},
        {"label": "spam", "text": "c\nd"},
        {"label": "ham", "text": "é\u2028"},
    ]
    assert places(rows) == ["line 2", "line 4", "line 6"]  # where each begins


def test_between_tabs_quotes_are_characters(path):
    path.write_text('label\ttext\nham\t"so he said\nham\t""\nspam\ta, b\n')
    assert [row.fields["text"] for row in read_table(path, "\t")] == ['"so he said', '""', "a, b"]


def test_columns_are_named_where_there_is_no_header_line(path):
    path.write_text("ham\ta\n")
    assert fields(read_table(path, "\t", ("label", "text"))) == [{"label": "ham", "text": "a"}]
    assert read_table(path, "\t") == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("label,text\nham,a\nham,a,b\n", r"line 3: has 3 fields, expected 2 \(label, text\); put a field that"),
        ('label,text\nham,"a\nb"\nham\n', r"line 4: has 1 field, expected 2"),
        ("text,label,text\n", r"line 1: column 'text' is there twice"),
        ('label,text\nham,"a" b\n', "line 2: ',' expected after '\"'"),
        ('label,text\nham,a\nham,"a\nham,b\n', "line 3: unexpected end of data"),
        ("label,text\nham," + "a" * 200_000, "line 2: field larger than field limit"),
    ],
)
def test_mistakes_in_a_table_are_named(path, content, expected):
    path.write_text(content)
    with pytest.raises(InputError, match=f"rows.txt {expected}") as error:
        read_table(path, ",")
    message(error)


def test_columns_named_twice_are_refused(path):
    path.write_text("a\tb\n")
    with pytest.raises(InputError, match="columns: column 'text' is there twice"):
        read_table(path, "\t", ("text", "text"))


def test_empty_names_are_no_names(path):
    """Some programs write empty columns behind the last, or an index without a name."""
    path.write_text(",text,,\n0,a,,\n")
    assert read_table(path, ",")[0].text("text") == "a"


# Files that are no text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("label,text\nham,é\n".encode("latin-1"), r"not UTF-8: byte 15 \(line 2\) is 0xe9"),
        ("label,text\n".encode("utf-16"), "is UTF-16, expected UTF-8"),
        (b"a,b\n\0\0\0\0", "4 of 8 characters are NUL"),
        (None, "no such file"),
    ],
)
@pytest.mark.parametrize("read", [read_jsonl, read_json, lambda path: read_table(path, ",")])
def test_files_that_cannot_be_read_as_text_are_named(path, read, content, expected):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"rows.txt: {expected}") as error:
        read(path)
    message(error)
    assert isinstance(error.value, MissingInputError) == (content is None)


# TensorFlow Datasets (what is read from prepared ones: tests of labelled texts and of benchmarks)


def test_without_a_network_it_says_so_at_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for name in ("glue/sst2", "imdb_reviews", "ag_news_subset"):
        start = time.monotonic()
        with pytest.raises(MissingInputError, match=f"^tfds:{name}: .*a way to download it from .*jsonl:FILE") as error:
            read_tfds(name, "train")
        message(error)
        assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imdb_review", "did you mean imdb_reviews"),
        ("wikipedai", r"did you mean .*wikipedia"),  # an old-style builder, which the list of names lacks at first
        ("cnn_dailymails", "did you mean .*cnn_dailymail"),
        ("glue/sst", r"glue has no configuration 'sst' \(did you mean sst2.*\); expected one of cola, sst2"),
        ("piqa/zz", "piqa has no configuration 'zz'; expected none: leave it out"),
        ("../x", "failed"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, monkeypatch, name, expected):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(MissingInputError, match=expected) as error:
        read_tfds(name, "train")
    message(error)
