"""A public docstring names the errors about the user's input that its function raises itself."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "slm_jax"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "commands" not in path.relative_to(PACKAGE).parts)
ERRORS = {"InputError", "MissingInputError"}
MAKING = ("__init__", "__post_init__")  # the docstring of the class tells of these


def raised(function: ast.FunctionDef) -> set[str]:
    """The errors that a function's own body raises by name; what is defined inside it is not its own."""
    names, nodes = set(), list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise):
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            names.add(error.id if isinstance(error, ast.Name) else None)
        nodes += ast.iter_child_nodes(node)
    return names & ERRORS


def unnamed(body: list[ast.stmt], class_docstring: str = "", prefix: str = "") -> Iterator[str]:
    """Name each function of a module or class, and the errors that its docstring does not name."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from unnamed(node.body, ast.get_docstring(node) or "", f"{node.name}.")
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name in MAKING):
            docstring = (ast.get_docstring(node) or "") + (class_docstring if node.name in MAKING else "")
            for error in sorted(raised(node) - set(re.findall(r"\w+", docstring))):
                yield f"{prefix}{node.name}: {error}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_docstrings_name_the_errors(path: Path) -> None:
    assert list(unnamed(ast.parse(path.read_text(encoding="utf-8")).body)) == []


def test_a_docstring_without_its_error_is_found() -> None:
    source = 'def f():\n    """Do it."""\n    raise InputError("x")\n'
    assert list(unnamed(ast.parse(source).body)) == ["f: InputError"]
    assert list(unnamed(ast.parse(source.replace("Do it.", "Raises: InputError: x.")).body)) == []
