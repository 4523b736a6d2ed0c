"""Fields of an entry that a user wrote: there, and text."""

from collections.abc import Mapping
from typing import Any

from slm_jax.errors import InputError


def get_field(fields: Mapping[str, Any], name: str, where: str) -> Any:
    """Return a field that must be there.

    Args:
        fields: all of an entry.
        name: of the one.
        where: where the entry stands, for messages.

    Raises:
        InputError: it is missing.
    """
    if name not in fields:
        there = ", ".join(map(str, fields)) or "none"
        raise InputError(f"{where}: no field {name!r} but {there:.200}; add it")
    return fields[name]


def get_text(fields: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that must be text, perhaps empty; arguments as for :func:`get_field`.

    Raises:
        InputError: it is missing, no text, or text that no file can hold.
    """
    value = get_field(fields, name, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is {value!r:.60}; expected text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: {name} has half a surrogate pair, which is no character; take it out")
    return value
