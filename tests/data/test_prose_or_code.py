"""What must hold of the labelled paragraphs that Python carries."""

import ast
import sysconfig
import textwrap
import time
from collections import Counter

import pytest

from slm_jax.data import builtin
from slm_jax.data.builtin import prose_or_code
from slm_jax.errors import MissingInputError


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A folder that is taken for the standard library."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    builtin._labelled_paragraphs.cache_clear()
    yield tmp_path
    builtin._labelled_paragraphs.cache_clear()


def test_there_are_some_thousand_texts_of_both_classes_and_none_twice():
    builtin._labelled_paragraphs.cache_clear()
    start = time.process_time()
    labelled = prose_or_code()
    assert time.process_time() - start < 10  # 1.6 s by itself; with room for machines that are busy
    counts = Counter(label for _, label in labelled)
    assert set(counts) == {"prose", "code"}
    assert counts["prose"] == counts["code"] > 800
    texts = [text for text, _ in labelled]
    assert len({" ".join(text.split()) for text in texts}) == len(texts)
    assert max(map(len, texts)) <= 400
    assert min(map(len, texts)) > 30
    assert all(text == textwrap.dedent(text).strip() for text in texts)
    assert prose_or_code() == labelled


def test_most_code_is_python_and_no_prose_is():
    parses = Counter()
    for text, label in prose_or_code():
        try:
            ast.parse(text)
            parses[label] += 1
        except SyntaxError:
            continue
    n = len(prose_or_code()) / 2
    assert parses["code"] > 0.6 * n  # the rest begins or ends within a statement
    assert parses["prose"] < 0.01 * n


def test_no_character_tells_the_classes_apart():
    labelled = prose_or_code()

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
    assert prose_or_code() == [
        ("The docstring's first paragraph is a sentence of prose", "prose"),
        ("A comment that has enough words to be\nprose, on two lines", "prose"),
        ("value = compute_something(first_argument, second)\nother = value + 1", "code"),
        ("first = argument * argument + argument\nif first:\n    return first", "code"),
    ]


def test_files_that_cannot_be_parsed_are_passed_over(stdlib):
    (stdlib / "a.py").write_text("# A comment that has enough words to be read.\n\nbut no Python follows it\n")
    (stdlib / "b.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    prose, code = "A comment that has enough words to be prose", "value = some_function(first_argument, second)"
    (stdlib / "c.py").write_text(f"# {prose}.\n\n{code}\n")
    assert prose_or_code() == [(prose, "prose"), (code, "code")]


def test_a_python_without_source_says_so(stdlib):
    with pytest.raises(MissingInputError, match=r"builtin:prose-or-code: .* use labelled texts of your own: csv:FILE"):
        prose_or_code()
