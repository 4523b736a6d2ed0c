"""Texts that every Python carries, so that a first run needs no download: English, and paragraphs of prose or code.

The English has two parts: the language reference behind `help("while")` and the docstrings of the standard library;
together about a megabyte of sentences. What exactly is there depends on the Python version, so nothing should be
measured against a fixed number on this text.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import os
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from slm_jax.errors import MissingInputError
from slm_jax.files import cache_folder, replace_text

# Not read: installed packages, tests and demos, and the code pages, which are tables.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
)

SHORTEST_PARAGRAPH = 40  # characters
LETTERS = 0.85  # the share of letters and spaces above which a paragraph is prose

SHORTEST_TEXT, LONGEST_TEXT = 40, 400  # characters of a labelled paragraph
MOST_PER_MODULE = 30  # labelled paragraphs of each class, so that no module has much of the whole
LARGEST_MODULE = 50_000  # bytes; larger ones would take half of the time and give little more

_UNDERLINE = re.compile(r"^[ \t]*([-=*~^#+])\1{3,}[ \t]*\n", re.MULTILINE)
_SENTENCE = re.compile(r"[A-Z].*[.!?:]")
_MARKS = re.compile(r"""^[ \t]*#+ ?|\A[a-zA-Z]?(""\"|\'{3})|(""\"|\'{3})\Z""", re.MULTILINE)


@functools.cache
def _documents() -> tuple[str, ...]:
    named = [*_topics(), *_kept_modules(Path(sysconfig.get_paths()["stdlib"]))]
    seen: set[str] = set()
    texts = [_prose(text, seen) for _, text in sorted(named, key=lambda pair: (pair[0].lower(), pair))]
    return tuple(filter(None, texts))


def _kept_modules(stdlib: Path) -> list[tuple[str, str]]:
    """`_modules`, kept in the user's cache folder: parsing the whole library takes a second or two."""
    with suppress(OSError, ValueError):
        return [(name, text) for name, text in json.loads(_cache_file(stdlib).read_text(encoding="utf-8"))]
    modules = list(_modules(stdlib))
    with suppress(OSError):
        file = _cache_file(stdlib)
        file.parent.mkdir(parents=True, exist_ok=True)
        for outdated in file.parent.glob(f"{file.stem.rpartition('-')[0]}-*.json"):
            outdated.unlink(missing_ok=True)
        replace_text(file, json.dumps(modules))
    return modules


def _cache_file(stdlib: Path) -> Path:
    """Return where the docstrings of these very files, as this one reads them, are kept."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(source_files(stdlib)):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    version = ".".join(map(str, sys.version_info[:3]))
    return cache_folder() / "builtin" / f"docstrings-{version}-{digest.hexdigest()[:16]}.json"


def python_docs() -> list[str]:
    """The language reference, one document a topic, and the standard library's docstrings, one document a module.

    They are ordered by name, topics among modules, so that a part cut off the end for validation holds both kinds.
    Only prose is kept, and no paragraph twice. Where the standard library comes without its source (an
    embedded Python), the topics are all there is. The first call takes a second or two.

    Raises:
        MissingInputError: this Python has neither the topics nor the standard library's source.
    """
    documents = list(_documents())
    if not documents:
        raise MissingInputError(
            "builtin:python-docs: this Python has neither pydoc_data.topics nor the standard library's source under "
            f"{sysconfig.get_paths()['stdlib']}; use a text of your own: text:FILE"
        )
    return documents


def _prose(text: str, seen: set[str]) -> str:
    """Keep the paragraphs that are sentences and not ``seen`` before, each on a line of its own.

    Code, grammars and tables are left out, and line breaks for 80 columns taken out: they say nothing, and a small
    model that has to learn them learns less English. A paragraph that came twice could come in both splits.
    """
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    fresh = [p for p in dict.fromkeys(paragraphs) if is_prose(p) and p not in seen]
    seen.update(fresh)
    return "\n".join(fresh)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is a sentence or more, mostly letters."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    long_enough = len(paragraph) >= SHORTEST_PARAGRAPH
    return long_enough and letters >= LETTERS * len(paragraph) and bool(_SENTENCE.fullmatch(paragraph))


def _topics() -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference."""
    try:
        yield from importlib.import_module("pydoc_data.topics").topics.items()
    except (ImportError, AttributeError):
        return


def _modules(stdlib: Path) -> Iterator[tuple[str, str]]:
    """(path, docstrings) of each public module below a folder; the source is parsed, nothing is imported."""
    for path in sorted(source_files(stdlib)):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # no reason to stop: this text is whatever can be found
        yield path.relative_to(stdlib).as_posix(), "\n\n".join(_docstrings(tree))


def source_files(stdlib: Path) -> Iterator[Path]:
    """Yield the public modules below a folder, in no order."""
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("_")]
        for name in files:
            if name.endswith(".py") and (name == "__init__.py" or not name.startswith("_")):
                yield Path(folder, name)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The docstrings of a module in the order in which its source has them."""
    raw = ast.get_docstring(node, clean=False)
    # A docstring may spell half a surrogate pair ("\ud800"), which no UTF-8 file can hold.
    if raw and "\0" not in raw and not any("\ud800" <= character <= "\udfff" for character in raw):
        yield _UNDERLINE.sub("", inspect.cleandoc(raw))
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


@functools.cache
def _labelled_paragraphs() -> tuple[tuple[str, str], ...]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    labelled: list[tuple[str, str]] = []
    for path in sorted(source_files(stdlib)):
        found: dict[str, list[str]] = {"prose": [], "code": []}
        for text, label in _paragraphs(path):
            key = " ".join(text.split())
            if SHORTEST_TEXT <= len(text) <= LONGEST_TEXT and key not in seen:
                seen.add(key)
                found[label].append(text)
        n = min(MOST_PER_MODULE, *map(len, found.values()))
        labelled += [(text, label) for label, texts in found.items() for text in texts[:n]]
    return tuple(labelled)


def prose_or_code() -> list[tuple[str, str]]:
    """Paragraphs of the standard library's source, each with its class: "prose" or "code".

    Prose is what docstrings and comments say in sentences, without quotes, comment signs and the last full stop; code
    is statements without either. Paragraphs that are both or neither are left out, as are texts that came before; a
    module gives as many of one class as of the other. The first call takes a second or two.

    Raises:
        MissingInputError: this Python comes without the standard library's source.
    """
    paragraphs = list(_labelled_paragraphs())
    if not paragraphs:
        raise MissingInputError(
            "builtin:prose-or-code: this Python comes without the standard library's source under "
            f"{sysconfig.get_paths()['stdlib']}; use labelled texts of your own: csv:FILE"
        )
    return paragraphs


def _paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    """The (text, class) of those paragraphs of a source file that have one."""
    try:
        if path.stat().st_size > LARGEST_MODULE:
            return
        source = path.read_text(encoding="utf-8")
        kinds = _line_kinds(source)
    except (OSError, SyntaxError, ValueError):
        return  # as in `_modules`
    lines = source.split("\n")
    for blank, numbers in itertools.groupby(range(len(lines)), lambda i: not lines[i].strip()):
        paragraph = list(numbers)
        kind = {kinds.get(i, "code") for i in paragraph}
        text = textwrap.dedent("\n".join(lines[i] for i in paragraph)).strip()
        if blank or "\0" in text:
            continue
        if kind == {"code"} and "#" not in text:
            yield text, "code"
        elif kind in ({"docstring"}, {"comment"}):
            text = _MARKS.sub("", text).strip()
            if is_prose(" ".join(text.split())):
                yield text.rstrip(".!?: \n"), "prose"  # almost no code ends so: the last token alone would tell


def _line_kinds(source: str) -> dict[int, str]:
    """What the lines of a source file are that are not plain code: comments, docstrings, or in other strings."""
    kinds = {i: "comment" for i, line in enumerate(source.split("\n")) if line.lstrip().startswith("#")}
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(_line_numbers(node))
        elif isinstance(node, ast.Constant | ast.JoinedStr) and node.lineno != node.end_lineno:
            kinds |= dict.fromkeys(_line_numbers(node), "string")
    return kinds | dict.fromkeys(docstrings, "docstring")


def _line_numbers(node: ast.expr | ast.stmt) -> range:
    return range(node.lineno - 1, node.end_lineno or node.lineno)
