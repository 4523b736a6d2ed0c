"""Renders chat templates of pretrained models, as transformers does, in a separate process.

Templates come with models and are not trusted: Jinja's sandbox keeps them away from the interpreter, and the process
limits time and memory (`slm_jax/data/chat_template.py` kills it). Run as a script: each input line is a JSON request,
each output line its answer. Imports nothing from slm_jax.
"""

import json
import secrets
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes
LONGEST = 1 << 24  # characters of a rendered text
_MARK = secrets.token_hex(8)  # no text of a message contains it


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}`` marks the text that the model writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_MARK}{caller()}{_MARK}"


class _Environment(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"reads the attribute {attribute!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


_ENVIRONMENT = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals["raise_exception"] = _raise_exception


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


def render(source: str, values: dict[str, Any], date: str = "") -> list[str]:
    """Return the text in pieces: the second, fourth, … are generation blocks."""

    def strftime_now(form: str) -> str:
        return (datetime.fromisoformat(date) if date else datetime.now()).strftime(form)

    pieces, n_characters = [], 0
    for piece in _compile(source).generate(**values, strftime_now=strftime_now):
        pieces.append(piece)
        n_characters += len(piece)
        if n_characters > LONGEST:
            raise TemplateError(f"makes more than {LONGEST:,} characters")
    return "".join(pieces).split(_MARK)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"pieces": render(**request)}
    except MemoryError:
        return {"error": f"needs more than {MEMORY >> 20:,} MB of memory"}
    except Exception as error:  # anything the template does
        line = getattr(error, "lineno", None)
        name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        what = f"{name}{' '.join(str(error).split())}"[:300]
        return {"error": what + ("" if line is None else f", in its line {line}")}


def main() -> None:
    """Answer requests until the input ends."""
    try:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line)) if line.strip() else {}), flush=True)


if __name__ == "__main__":
    main()
