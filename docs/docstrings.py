"""Griffe extension: what the reference shows of slm_jax beside what griffe finds by itself.

Flax modules are made as dataclasses are: their fields are shown as the arguments of the class. Names of slm_jax in
docstrings become links to where the reference has them, tables become Markdown's, and each name keeps the address of
its source for templates/python/material/docstring.html.jinja.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import griffe

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

NAME = re.compile(r"(?::\w+:)?(?<!`)`~?([A-Za-z_][\w.]*)`(?!`)|``([A-Za-z_][\w.]*)``")

TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 .*)*)", re.M)  # "q, k, v: what all of them are"

TABLE = re.compile(r"^( *)(=+(?:  =+)+)\n(.*)\n\1\2\n((?:.*\n)*?)\1\2$", re.M)


class Names(griffe.Extension):
    """Add constructors to Flax modules, and links to docstrings."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Go through a package when all of it is known."""
        if pkg.name == "slm_jax":
            _add_source(pkg)
            self._visit(pkg)

    def _visit(self, parent: griffe.Module | griffe.Class) -> None:
        for member in list(parent.members.values()):
            if member.is_alias:
                continue
            _add_source(member)
            if isinstance(member, griffe.Class) and any(str(base) == "nn.Module" for base in member.bases):
                _add_constructor(member)
            if member.docstring:
                text = TABLE.sub(_table, TOGETHER.sub(_one_each, member.docstring.value))
                member.docstring.value = NAME.sub(lambda match, scope=member: _link(match, scope), text)
            if isinstance(member, griffe.Module | griffe.Class):
                self._visit(member)


def _add_source(member: griffe.Object) -> None:
    """Keep the address of the line that defines a name."""
    file = member.relative_package_filepath.as_posix()
    member.extra["slm_jax"]["source"] = f"{PROJECT['urls']['Repository']}/blob/main/{file}#L{member.lineno or 1}"


def _one_each(match: re.Match[str]) -> str:
    """Return an entry for each of the arguments that a docstring describes together."""
    return "\n".join(f"{match[1]}{name}: {match[3]}" for name in match[2].split(", "))


def _table(match: re.Match[str]) -> str:
    """Return a table of columns of text, which a person reads in the source, as Markdown has it."""
    indent = match[1]
    starts = [column.start() for column in re.finditer("=+", match[2])]
    rows: list[list[str]] = []
    for line in [match[3], *match[4].splitlines()]:
        text = line.removeprefix(indent)
        cells = [text[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        if cells[0]:
            rows.append(cells)
        else:  # the rest of the row above
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    rows.insert(1, ["---"] * len(starts))
    return "\n".join(f"{indent}| {' | '.join(row)} |" for row in rows)


def _add_constructor(module: griffe.Class) -> None:
    """Show the fields of a Flax module as arguments."""
    made = [
        griffe.Parameter(
            field.name,
            annotation=field.annotation,
            kind=griffe.ParameterKind.positional_or_keyword,
            default=field.value,
        )
        for field in module.members.values()
        if field.is_attribute and field.annotation is not None
    ]
    module.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*made)))


def _link(match: re.Match[str], scope: griffe.Object) -> str:
    """Return a name in code, as a link if the reference may have it."""
    name = match[1] or match[2]
    try:
        path = name if name.startswith("slm_jax.") else scope.resolve(name)
        path = scope.modules_collection[path].canonical_path
    except (griffe.NameResolutionError, griffe.AliasResolutionError, KeyError, AttributeError):
        return f"`{name}`"
    if not path.startswith("slm_jax.") or path == scope.path:
        return f"`{name}`"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
