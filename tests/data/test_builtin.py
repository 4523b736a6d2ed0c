"""What must hold of the built-in data: there without a download, the same each time, and of the kind it should be."""

import ast
import sys
import sysconfig
import textwrap
import time
from collections import Counter

import pytest
from refusals import refused

from slm_jax.data.builtin import INSTRUCTION, docstring_entries, prose_or_code, python_docs
from slm_jax.data.sources import parse_source
from slm_jax.errors import MissingInputError

# python-docs


def test_the_builtin_text_is_plenty_and_always_the_same():
    first = parse_source("builtin:python-docs").read_documents()
    python_docs.cache_clear()
    assert parse_source("builtin:python-docs").read_documents() == first
    whole = "\n\n".join(first)
    assert 800_000 < len(whole) < 4_000_000
    assert len(whole.encode("utf-8")) < 1.02 * len(whole)  # English
    assert 'The "while" statement is used for repeated execution' in whole
    assert all(document == document.strip() and document for document in first)
    paragraphs = [paragraph for document in first for paragraph in document.split("\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 3000


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A folder that stands for the standard library."""
    library = tmp_path / "library"
    library.mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    for function in (python_docs, prose_or_code):
        function.cache_clear()
    yield library
    for function in (python_docs, prose_or_code):
        function.cache_clear()


def test_modules_are_read_without_being_imported_and_only_prose_is_kept(stdlib, monkeypatch):
    long = "A sentence that is long enough to be kept, since it has many words in it."
    broken = long.replace(" enough", "\n    enough")
    table = "Name | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11."
    module = f'''"""{broken}

no capital letter at its start, so it is a part of something.

{table}

>>> f(1) + g(2) ** h(3, 4) == "a doctest is no prose, however long it is"
"""
raise SystemExit
def f():
    """Short."""
class C:
    def g(self):
        """G: {long}"""
'''
    for name in ("loud.py", "pkg/__init__.py", "_private.py", "test/t.py", "site-packages/s.py"):
        (stdlib / name).parent.mkdir(exist_ok=True)
        (stdlib / name).write_text(module.replace("sentence", name))
    (stdlib / "copy.py").write_text((stdlib / "loud.py").read_text())
    (stdlib / "broken.py").write_text("def (:\n")
    (stdlib / "binary.py").write_bytes(b"\0\xff")
    (stdlib / "half.py").write_text(f'"""{long} \\ud800"""')
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    loud, package = (long.replace("sentence", name) for name in ("loud.py", "pkg/__init__.py"))
    # loud.py says nothing that copy.py did not
    assert parse_source("builtin:python-docs").read_documents() == [f"{text}\nG: {text}" for text in (loud, package)]


def test_docstrings_are_kept_until_a_module_changes_and_no_cache_is_needed(stdlib, tmp_path, monkeypatch):
    cache, file, module = tmp_path / "cache", tmp_path / "file", stdlib / "module.py"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)

    def read():
        python_docs.cache_clear()
        return python_docs()

    first, second = (f"The {name} version of this module says something about itself." for name in ("first", "second"))
    module.write_text(f'"""{first}"""')
    assert read() == (first,)
    (kept,) = cache.rglob("*.json")
    kept.write_text('["Kept."]')
    assert read() == ("Kept.",)
    kept.write_text("damaged")
    assert read() == (first,)
    module.write_text(f'"""{second}"""')
    assert read() == (second,)
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # nothing can be written there
    assert read() == (second,)


def test_a_python_without_its_source_still_has_the_topics(stdlib, monkeypatch):
    assert sum(map(len, parse_source("builtin:python-docs").read_documents())) > 100_000
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    python_docs.cache_clear()
    for name in ("python-docs", "prose-or-code"):
        with refused(rf"builtin:{name}: .* source .*{stdlib}.* use a file of your own", MissingInputError):
            list(parse_source(f"builtin:{name}").texts())


# prose-or-code


def test_there_are_some_thousand_texts_of_both_classes_and_none_twice():
    prose_or_code.cache_clear()
    start = time.process_time()
    labelled = prose_or_code()
    assert time.process_time() - start < 10  # 1.6 s by itself; with room for machines that are busy
    counts = Counter(row["label"] for row in labelled)
    assert set(counts) == {"prose", "code"}
    assert counts["prose"] == counts["code"] > 800
    texts = [row["text"] for row in labelled]
    assert len({" ".join(text.split()) for text in texts}) == len(texts)
    assert max(map(len, texts)) <= 400
    assert min(map(len, texts)) > 30
    assert all(text == textwrap.dedent(text).strip() for text in texts)
    assert prose_or_code() == labelled


def test_no_character_tells_the_classes_apart():
    labelled = [(row["text"], row["label"]) for row in prose_or_code()]

    def accuracy(tells) -> float:
        hits = sum(tells(text) == (label == "code") for text, label in labelled) / len(labelled)
        return max(hits, 1 - hits)

    characters = {character for text, _ in labelled for character in text}
    assert max(accuracy(lambda text, c=character: c in text) for character in characters) < 0.9
    assert max(accuracy(lambda text, c=character: text[-1] == c) for character in characters) < 0.8


def test_a_paragraph_has_the_class_of_all_its_lines(stdlib):
    (stdlib / "module.py").write_text(
        '''"""The docstring's first paragraph is a sentence of prose.

    >>> a_doctest_is_neither_prose_nor_code(1, 2, 3)
"""

# A comment that has enough words to be
# prose, on two lines.

value = compute_something(first_argument, second)
other = value + 1

mixed = value + 1  # Code with a comment beside it, which is both of them.

text = """A string that is no docstring holds lines

Which read as if they were sentences of some prose.

"""

def function(argument):
    """Docstrings that stand directly below the code are both.

    Below them come paragraphs that are prose only,
    whatever their indentation is.
    """

    first = argument * argument + argument
    if first:
        return first
'''
    )
    assert [(row["text"], row["label"]) for row in prose_or_code()] == [
        ("The docstring's first paragraph is a sentence of prose", "prose"),
        ("A comment that has enough words to be\nprose, on two lines", "prose"),
        ("value = compute_something(first_argument, second)\nother = value + 1", "code"),
        ("first = argument * argument + argument\nif first:\n    return first", "code"),
    ]


# docstrings


def test_builtin_pairs_are_signatures_and_sentences():
    entries = docstring_entries()
    assert len(entries) > 1000
    assert len({one["input"] for one in entries}) == len(entries)
    for one in entries:
        assert one["instruction"] == INSTRUCTION
        (function,) = ast.parse(f"{one['input']} pass").body
        assert not function.name.startswith("_")
        assert "\n" not in one["input"] + one["output"]
        assert one["output"][0].isupper()
        assert one["output"][-1] in ".!?:"
    assert any("async def" in one["input"] for one in entries)
