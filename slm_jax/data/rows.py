"""What every source yields: rows of named fields, or the pieces of texts."""

import difflib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from slm_jax.errors import InputError

OnRead = Callable[[int], None]  # called with the number of bytes read from files since the last call
Pieces = Iterator[str]  # one text, in pieces


def ignore_bytes(_: int) -> None:
    """Ignore how many bytes were read."""


class Row(NamedTuple):
    """One example: its fields, and its place, such as ``spam.csv line 12``, for messages."""

    where: str
    fields: Mapping[str, Any]

    def field(self, name: str, setting: str | None = None) -> Any:
        """Return a field; InputError: it is missing (``setting`` is the configuration key that chose its name)."""
        if name not in self.fields:
            raise no_field(self.where, name, self.fields, setting)
        return self.fields[name]

    def text(self, name: str, setting: str | None = None) -> str:
        """Return a field that must be text, perhaps empty, without a lone surrogate; otherwise as `field`."""
        value = self.field(name, setting)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {name} is {value!r:.60}; expected text")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise InputError(f"{self.where}: {name} has half a surrogate pair; expected valid Unicode")
        return value

    def filled(self, name: str, setting: str | None = None) -> str:
        """Return a field that must be text with more than white space; otherwise as `field`."""
        if not (text := self.text(name, setting)).strip():
            raise InputError(f"{self.where}: {name} is empty; expected text")
        return text


class Source:
    """Where data comes from: ``SCHEME:NAME``, parsed by `slm_jax.data.sources.parse_source`.

    A subclass reads one scheme. It implements `rows`, or `texts` if its data has no named fields.

    Attributes:
        scheme: the part before the colon.
        form: how such a source is written, for messages.
        names: the names that exist; None if that isn't known before reading.
        name: the part after the colon.
        header: column names for tables without a header line.
        split: the split that is read from a data set with splits if the name doesn't have one.
    """

    scheme: ClassVar[str]
    form: ClassVar[str]
    names: ClassVar[Collection[str] | None] = None

    def __init__(self, name: str, *, header: Sequence[str] = (), split: str = "train") -> None:
        if self.names is not None and name not in self.names:
            hint = did_you_mean(name, self.names)
            raise InputError(f"{self.scheme}:{name}: no such data set{hint}; expected one of {', '.join(self.names)}")
        self.name, self.header, self.split = name, tuple(header), split

    def __str__(self) -> str:
        return f"{self.scheme}:{self.name}"

    @property
    def has_rows(self) -> bool:
        """Whether the data has named fields."""
        return True

    def files(self) -> list[Path] | None:
        """Return the files that the source names; None if it doesn't name any."""
        return None

    def text_column(self) -> str:
        """Return the name of the field that holds the text, unless the user sets another one."""
        return "text"

    def class_names(self, column: str) -> tuple[str, ...]:
        """Return the names of a label's classes by index; empty if the source doesn't declare them."""
        return ()

    def rows(self, columns: Sequence[str] = (), on_read: OnRead = ignore_bytes) -> Iterator[Row]:
        """Return the rows in a fixed order; missing files are reported at once, other errors while iterating.

        Args:
            columns: the fields that are needed, for formats that can skip the others; default: all.
            on_read: called with the number of bytes read from files since the last call.

        Raises:
            InputError: the source cannot be read or has no named fields.
        """
        raise InputError(f"source {self} has no named fields; expected rows, such as jsonl:FILE")

    def texts(self, column: str | None = None, on_read: OnRead = ignore_bytes) -> Iterator[Pieces]:
        """Return the text of each file or row in a fixed order; null is empty. Arguments and errors as for `rows`."""
        name = self.text_column() if column is None else column
        return (
            iter([row.text(name, "text_column") if row.field(name, "text_column") is not None else ""])
            for row in self.rows([name], on_read)
        )

    def read_rows(self, limit: int | None = None, columns: Sequence[str] = ()) -> list[Row]:
        """Return the first ``limit`` rows (None: all); InputError: as `rows`, or there is no row."""
        rows = list(itertools.islice(self.rows(columns), limit))
        if not rows:
            raise InputError(f"source {self} is empty; expected at least one row")
        return rows


def no_field(where: str, name: str, names: Iterable[str], setting: str | None = None) -> InputError:
    """Return the error for a missing field, with the fields that exist."""
    known = list(map(str, names))
    remedy = f"; set {setting} to one of them" if setting else ""
    return InputError(
        f"{where}: no field {name!r}{did_you_mean(name, known)}, only {', '.join(known) or 'none':.300}{remedy}"
    )


def did_you_mean(name: str, names: Iterable[str], n: int = 1) -> str:
    """Return " (did you mean …?)" with the ``n`` nearest names; empty if none is near."""
    near = difflib.get_close_matches(name, list(names), n=n, cutoff=0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""
