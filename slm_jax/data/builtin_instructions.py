"""Instructions with responses that every Python carries: what the functions of its standard library do.

As with :mod:`slm_jax.data.builtin`, what exactly is there depends on the Python version.
"""

import ast
import functools
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from slm_jax.data.builtin import is_prose, source_files
from slm_jax.errors import MissingInputError

INSTRUCTION = "Explain this function."


@functools.cache
def docstring_entries() -> tuple[dict[str, str], ...]:
    """Public functions and methods, Alpaca style: their signature is the input, the first paragraph of the docstring
    the output.

    In the order of their files; a signature that comes again, or without prose in its docstring, is left out. The
    source is parsed, nothing is imported; that takes a second or two.

    Raises:
        MissingInputError: a Python that comes without the source of its standard library.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    explained: dict[str, str] = {}
    for path in sorted(source_files(stdlib)):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # no reason to stop: these are whatever can be found
        for function in _functions(tree):
            paragraph = _first_paragraph(function)
            if is_prose(paragraph) and paragraph.isprintable():  # no half surrogate pairs, which some spell
                explained.setdefault(_signature(function), paragraph)
    if not explained:
        raise MissingInputError(
            f"builtin:docstrings: the source of the standard library is not under {stdlib}; use instructions of your "
            "own: json:FILE"
        )
    return tuple(
        {"instruction": INSTRUCTION, "input": signature, "output": paragraph}
        for signature, paragraph in explained.items()
    )


def _functions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The public functions and methods in the order in which the source has them."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from _functions(child)
            else:
                yield child


def _first_paragraph(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    raw = ast.get_docstring(function, clean=False) or ""
    return " ".join(inspect.cleandoc(raw).partition("\n\n")[0].split())


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The ``def`` line, on one line."""
    function.body, function.decorator_list = [ast.Pass()], []
    return ast.unparse(function).removesuffix("pass").strip()
