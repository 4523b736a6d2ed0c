"""``builtin:`` sources: data that come with Python, so that a first run needs no download.

- ``python-docs``: English, about a megabyte: the language reference behind `help("while")`, and the docstrings of the
  standard library.
- ``prose-or-code``: labelled paragraphs of the standard library's source.
- ``docstrings``: instructions to explain a function of the standard library.
- ``docstring-preferences``: the same with a chosen response, and a rejected one that begins another explanation.

The content depends on the Python version, so golden numbers must not depend on it. The library's source is parsed, not
imported; the first use takes a second or two.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from slm_jax.data.rows import OnRead, Row, Source, ignore_bytes
from slm_jax.errors import MissingInputError
from slm_jax.files import cache_folder, read_json, replace_text

# Not read: installed packages, tests, demos, and code pages (tables).
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
SHORTEST_PARAGRAPH = 40  # characters
LETTERS = 0.85  # share of letters and spaces from which a paragraph counts as prose
SHORTEST_TEXT, LONGEST_TEXT = 40, 400  # characters of a labelled paragraph
MOST_PER_MODULE = 30  # labelled paragraphs of each class, so that no module dominates
LARGEST_MODULE = 50_000  # bytes; larger modules would take half the time and add little
INSTRUCTION = "Explain this function."
_UNDERLINE = re.compile(r"^[ \t]*([-=*~^#+])\1{3,}[ \t]*\n", re.MULTILINE)
_SENTENCE = re.compile(r"[A-Z].*[.!?:]")
_MARKS = re.compile(r"""^[ \t]*#+ ?|\A[a-zA-Z]?(""\"|\'{3})|(""\"|\'{3})\Z""", re.MULTILINE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _source_files() -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(_stdlib()):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("_")]
        for name in files:
            if name.endswith(".py") and (name == "__init__.py" or not name.startswith("_")):
                found.append(Path(folder, name))
    return sorted(found)


def _modules(largest: float = math.inf) -> Iterator[tuple[Path, str, ast.Module]]:
    """Yield path, source and syntax tree of each module that can be parsed and has at most ``largest`` bytes."""
    for path in _source_files():
        with suppress(OSError, SyntaxError, ValueError):
            if path.stat().st_size <= largest:
                source = path.read_text(encoding="utf-8")
                yield path, source, ast.parse(source)


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    long_enough = len(paragraph) >= SHORTEST_PARAGRAPH
    return long_enough and letters >= LETTERS * len(paragraph) and bool(_SENTENCE.fullmatch(paragraph))


# python-docs


@functools.cache
def python_docs() -> tuple[str, ...]:
    """Return the language reference, one document a topic, and the standard library's docstrings, one a module.

    Topics and modules are sorted together by name, so that the end, which is cut off for validation, has both. Only
    prose is kept, without repeated paragraphs. An embedded Python has no source files, so it has only the topics. The
    result is cached in the user's cache folder if possible.
    """
    topics: dict[str, str] = {}
    with suppress(ImportError, AttributeError):
        topics = importlib.import_module("pydoc_data.topics").topics
    file = None
    with suppress(OSError, ValueError):
        file = cache_folder() / "builtin" / f"python-docs-{_digest(topics)}.json"
        return tuple(read_json(file, kind=list[str]))
    modules = {path.relative_to(_stdlib()).as_posix(): "\n\n".join(_docstrings(tree)) for path, _, tree in _modules()}
    named = [*topics.items(), *modules.items()]
    seen: set[str] = set()
    texts = [_prose(text, seen) for _, text in sorted(named, key=lambda pair: (pair[0].lower(), pair))]
    documents = tuple(filter(None, texts))
    with suppress(OSError):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(documents))
    return documents


def _digest(topics: dict[str, str]) -> str:
    """Return a digest that changes with the topics, the library's files and this module."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + json.dumps(topics).encode())
    for path in _source_files():
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _prose(text: str, seen: set[str]) -> str:
    """Keep the paragraphs that are sentences and not yet ``seen``, each on one line.

    Code, grammars, tables and line breaks at 80 columns are dropped, because a small model that has to learn them
    learns less English. Repeated paragraphs are dropped, because they could be in both splits.
    """
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    fresh = [p for p in dict.fromkeys(paragraphs) if _is_prose(p) and p not in seen]
    seen.update(fresh)
    return "\n".join(fresh)


def _docstrings(node: ast.Module | ast.ClassDef | Function) -> Iterator[str]:
    raw = ast.get_docstring(node, clean=False)
    # A docstring may contain a lone surrogate ("\ud800"), which UTF-8 cannot encode.
    if raw and "\0" not in raw and not any("\ud800" <= character <= "\udfff" for character in raw):
        yield _UNDERLINE.sub("", inspect.cleandoc(raw))
    for child in node.body:
        if isinstance(child, ast.ClassDef | Function):
            yield from _docstrings(child)


# prose-or-code


@functools.cache
def prose_or_code() -> tuple[dict[str, str], ...]:
    """Return paragraphs of the standard library's source, each a ``text`` with its ``label``, "prose" or "code".

    Prose comes from docstrings and comments, without quotes, comment signs and the last full stop; code is statements
    without docstrings and comments. Repeated texts are left out; each module gives equally many texts of both classes.
    """
    seen: set[str] = set()
    labelled: list[dict[str, str]] = []
    for _, source, tree in _modules(LARGEST_MODULE):
        found: dict[str, list[str]] = {"prose": [], "code": []}
        for text, label in _paragraphs(source, tree):
            key = " ".join(text.split())
            if SHORTEST_TEXT <= len(text) <= LONGEST_TEXT and key not in seen:
                seen.add(key)
                found[label].append(text)
        n = min(MOST_PER_MODULE, *map(len, found.values()))
        labelled += [{"text": text, "label": label} for label, texts in found.items() for text in texts[:n]]
    return tuple(labelled)


def _paragraphs(source: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    lines = source.split("\n")
    kinds = _line_kinds(lines, tree)
    for _, numbers in itertools.groupby(range(len(lines)), lambda i: not lines[i].strip()):
        paragraph = list(numbers)
        kind = {kinds.get(i, "code") for i in paragraph}
        text = textwrap.dedent("\n".join(lines[i] for i in paragraph)).strip()
        if text and kind == {"code"} and "#" not in text:
            yield text, "code"
        elif kind in ({"docstring"}, {"comment"}):
            text = _MARKS.sub("", text).strip()
            if _is_prose(" ".join(text.split())):
                yield text.rstrip(".!?: \n"), "prose"  # code rarely ends like this, which would reveal the class


def _line_kinds(lines: list[str], tree: ast.Module) -> dict[int, str]:
    """Return the kind of each line that is not plain code: comments, docstrings, other multi-line strings."""
    kinds = {i: "comment" for i, line in enumerate(lines) if line.lstrip().startswith("#")}
    docstrings: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= dict.fromkeys(range(node.lineno - 1, node.end_lineno or node.lineno), "docstring")
        elif isinstance(node, ast.Constant | ast.JoinedStr) and node.lineno != node.end_lineno:
            kinds |= dict.fromkeys(range(node.lineno - 1, node.end_lineno or node.lineno), "string")
    return kinds | docstrings


# docstrings


@functools.cache
def docstring_entries() -> tuple[dict[str, str], ...]:
    """Return Alpaca entries for public functions and methods: input signature, output first docstring paragraph."""
    explained: dict[str, str] = {}
    for _, _, tree in _modules():
        for function in _public_functions(tree):
            raw = ast.get_docstring(function, clean=False) or ""
            paragraph = " ".join(inspect.cleandoc(raw).partition("\n\n")[0].split())
            if _is_prose(paragraph) and paragraph.isprintable():  # no lone surrogates
                function.body, function.decorator_list = [ast.Pass()], []
                signature = ast.unparse(function).removesuffix("pass").strip()
                explained.setdefault(signature, paragraph)
    return tuple({"instruction": INSTRUCTION, "input": name, "output": text} for name, text in explained.items())


def docstring_preferences() -> tuple[dict[str, str], ...]:
    """Return the entries with their output as the chosen response; the rejected one begins another explanation."""
    entries = docstring_entries()
    half = len(entries) // 2
    others = (*entries[half:], *entries[:half])
    return tuple(
        {
            "instruction": entry["instruction"],
            "input": entry["input"],
            "chosen": entry["output"],
            "rejected": " ".join([entry["output"], *other["output"].split()[:6]]),
        }
        for entry, other in zip(entries, others, strict=True)
    )


def _public_functions(node: ast.Module | ast.ClassDef) -> Iterator[Function]:
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _public_functions(child)
        elif isinstance(child, Function) and not child.name.startswith("_"):
            yield child


BUILTINS: dict[str, Callable[[], tuple[Any, ...]]] = {  # each returns texts or the fields of rows
    "python-docs": python_docs,
    "prose-or-code": prose_or_code,
    "docstrings": docstring_entries,
    "docstring-preferences": docstring_preferences,
}


class Builtin(Source):
    """One of the built-in data sets."""

    scheme, form, names = "builtin", "builtin:NAME", BUILTINS

    def rows(self, columns: Sequence[str] = (), on_read: OnRead = ignore_bytes) -> Iterator[Row]:
        data = BUILTINS[self.name]()
        if not data:
            raise MissingInputError(f"{self}: no source of the standard library in {_stdlib()}; use a file of your own")
        fields = ({"text": row} if isinstance(row, str) else row for row in data)
        return (Row(f"{self} entry {i}", row) for i, row in enumerate(fields, start=1))
