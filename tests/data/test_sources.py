"""What must hold of sources: one registry, mistakes in the string named with the nearest, and light imports."""

import json
import subprocess
import sys

import pytest
from refusals import refused

from slm_jax.data.config import ClassificationConfig, DataConfig, InstructionConfig, TokenizerConfig
from slm_jax.data.corpus import load_corpus
from slm_jax.data.documents import read_documents
from slm_jax.data.instructions import load_instructions
from slm_jax.data.labelled import load_labelled
from slm_jax.data.rows import Row, Source, ignore_bytes
from slm_jax.data.sources import SOURCES, check_text_column, parse_source


@pytest.mark.parametrize("source", ["text:books/*.txt", "text:C:\\a.txt", "tfds:glue/sst2:test[:5]", "tokens:a.bin"])
def test_a_source_is_a_scheme_and_a_name(source):
    parsed = parse_source(source)
    assert str(parsed) == source
    assert f"{parsed.scheme}:{parsed.name}" == source


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("mytext.txt", "did you mean text:mytext.txt"),
        ("data/train.bin", "did you mean tokens:data/train.bin"),
        ("data.jsonl.gz", "did you mean jsonl:data.jsonl.gz"),
        ("tinyshakespeare", "did you mean named:tinyshakespeare"),
        ("prose-or-code", "did you mean builtin:prose-or-code"),
        ("C:\\books\\a.txt", r"did you mean text:C:\\"),
        ("jsno:a.json", "did you mean json:a.json"),
        ("Named:the-verdict", "did you mean named:the-verdict"),
        ("https://example.com/a.txt", "unknown scheme 'https'"),
        ("text:", "no name; expected text:GLOB"),
        ("", "no scheme; expected"),
        ("named:tiny-shakespeare", r"did you mean tinyshakespeare\?\); expected one of the-verdict, tinysh"),
        ("named:moby-dick", "no such data set; expected one of the-verdict"),
        ("builtin:python-doc", r"did you mean python-docs\?\); expected one of python-docs, prose-or-code"),
    ],
)
def test_a_wrong_source_is_named_with_the_right_one(source, expected):
    with refused(expected):
        parse_source(source)


def test_an_unknown_scheme_lists_those_that_exist():
    with refused("unknown scheme 'ftp'; expected one of") as error:
        parse_source("ftp:a")
    assert all(known.form in str(error.value) for known in SOURCES.values())


def test_the_same_rows_can_be_documents_or_labelled_texts(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20)))
    source = f"csv:{tmp_path}/a.csv"
    assert read_documents(parse_source(source)) == [f"text {i}" for i in range(20)]
    assert read_documents(parse_source(source), "label") == ["a", "b"] * 10
    assert load_labelled(DataConfig(source=source), ClassificationConfig(), 0).classes == ("a", "b")


def test_a_new_source_is_a_class_and_its_entry_in_the_registry(monkeypatch):
    """All consumers then understand it."""

    class Numbers(Source):
        scheme, form = "numbers", "numbers:N"

        def rows(self, columns=(), on_read=ignore_bytes):
            fields = ({"text": f"text {i}", "label": i % 2, "instruction": f"{i}?", "output": "!"} for i in range(30))
            return (Row(f"{self} {i}", row) for i, row in enumerate(fields))

    monkeypatch.setitem(SOURCES, "numbers", Numbers)
    data = DataConfig(source="numbers:30")
    assert load_corpus(data, TokenizerConfig(kind="simple")).train.size > 50
    assert load_labelled(data, ClassificationConfig(), 0).classes == ("0", "1")
    assert len(load_instructions(data, InstructionConfig(), 0).train) == 21
    with refused("did you mean numbers:30"):
        parse_source("number:30")


def test_what_has_no_fields_or_no_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    for source in (f"text:{tmp_path}/a.txt", "builtin:python-docs", "named:the-verdict", "tokens:a.bin"):
        with refused("no named fields; expected rows"):
            parse_source(source).read_rows()
        with refused("text_column is 'body', but .* has no columns"):
            check_text_column("body", [parse_source(source)])
    with refused("holds token ids, expected text"):
        parse_source("tokens:a.bin").texts()
    check_text_column("body", [parse_source("text:a.txt"), parse_source("jsonl:a.jsonl")])
    check_text_column(None, [parse_source("text:a.txt")])


# Rows


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


def test_reading_data_imports_neither_flax_nor_what_other_sources_need():
    code = (
        "import json, sys, slm_jax.data.corpus, slm_jax.data.labelled, slm_jax.data.instructions\n"
        "heavy = ('flax', 'jax', 'pyarrow', 'tensorflow_datasets', 'grain', 'requests', 'tiktoken', 'tokenizers')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))\n"
        "import slm_jax.data.prepare, slm_jax.data.text_batches, slm_jax.data.instruction_batches\n"
        "print(json.dumps([name for name in ('flax', 'pyarrow') if name in sys.modules]))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in found.splitlines()] == [[], []]
