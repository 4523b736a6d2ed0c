"""What sources yield: rows of named fields, or texts in pieces, with one or more documents."""

import difflib
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from slm_jax.errors import InputError
from slm_jax.tokenizer import END_OF_TEXT

OnRead = Callable[[int], None]  # called with the number of bytes read from files since the last call
Pieces = Iterable[str]  # a text in pieces


def ignore_bytes(_: int) -> None:
    """Ignore how many bytes were read."""


class EmptyField(InputError):
    """A required text is null or has only white space."""


class Row(NamedTuple):
    """One example: its fields, and where it is from, such as ``spam.csv line 12``, for error messages."""

    where: str
    fields: Mapping[str, Any]

    def field(self, name: str, setting: str | None = None) -> Any:
        """Return a field; InputError: it is missing (``setting`` is the configuration key that chose its name)."""
        if name in self.fields:
            return self.fields[name]
        remedy = f"; set {setting} to one of them" if setting else ""
        known = f"only {', '.join(map(str, itertools.islice(self.fields, 50))) or 'none':.300}"
        raise InputError(f"{self.where}: no field {name!r}{did_you_mean(name, self.fields)}, {known}{remedy}")

    def text(self, name: str, setting: str | None = None) -> str:
        """Return a text field, which may be empty; InputError: as `field`, or not text, or a lone surrogate."""
        value = self.field(name, setting)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {name} is {value!r:.60}; expected text")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise InputError(f"{self.where}: {name} has half a surrogate pair; expected valid Unicode")
        return value

    def filled(self, name: str, setting: str | None = None) -> str:
        """Return a text field; EmptyField: it is null or has only white space; InputError: as `text`."""
        if self.field(name, setting) is None or not (text := self.text(name, setting)).strip():
            raise EmptyField(f"{self.where}: {name} is empty; expected text")
        return text


class Source:
    """Where data comes from: ``SCHEME:NAME``, parsed by `slm_jax.data.sources.parse_source`.

    A subclass reads one scheme. It implements `rows`, or `texts` if its data have no named fields. ``header`` names the
    columns of tables without a header line; ``split`` is the split of a data set if the name has none.
    """

    scheme: ClassVar[str]
    form: ClassVar[str]  # syntax of such a source, for messages
    names: ClassVar[Collection[str] | None] = None  # existing names, if known before reading

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

    def vocab_size(self) -> int | None:
        """Return the vocabulary size of token ids; None: the source is text, or it is unknown."""
        return None

    def text_column(self) -> str:
        """Return the default name of the field with the text."""
        return "text"

    def class_names(self, column: str) -> tuple[str, ...]:
        """Return the class names of a label by index; empty if the source does not define them."""
        return ()

    def rows(self, columns: Sequence[str] = (), on_read: OnRead = ignore_bytes) -> Iterator[Row]:
        """Return the rows in a fixed order, with at least the fields ``columns`` (default: all).

        ``on_read`` is called with the number of bytes read from files since the last call. InputError: the source
        cannot be read (missing files are reported immediately) or has no named fields.
        """
        raise InputError(f"source {self} has no named fields; expected rows, such as jsonl:FILE")

    def texts(self, column: str | None = None, on_read: OnRead = ignore_bytes) -> Iterator[Pieces]:
        """Return the text of each file or row in a fixed order; null becomes empty. Otherwise like `rows`."""
        name = self.text_column() if column is None else column
        return (
            [row.text(name, "text_column") if row.field(name, "text_column") is not None else ""]
            for row in self.rows([name], on_read)
        )

    def documents(
        self,
        text_column: str | None = None,
        on_read: OnRead = ignore_bytes,
        on_empty: Callable[[], None] = lambda: None,
        may_be_empty: bool = False,
    ) -> Iterator[Iterator[str]]:
        """Return the documents in a fixed order, each as an iterator of pieces, so that it need not fit into memory.

        A text file or row is one document, or several separated by a literal ``<|endoftext|>``. Documents with only
        white space are skipped; ``on_empty`` is called for each file or row without a document. Read a document before
        requesting the next one. Memory holds about a megabyte of a text file, or one row (Parquet: 64 rows).
        InputError: as `texts`, or there is no document and ``may_be_empty`` is false.
        """
        return self._documents(self.texts(text_column, on_read), on_empty, may_be_empty)

    def _documents(
        self, texts: Iterable[Pieces], on_empty: Callable[[], None], may_be_empty: bool
    ) -> Iterator[Iterator[str]]:
        found_any = False
        for text in texts:
            is_empty = True
            for document in _split(text):
                is_empty = False
                yield document
            found_any |= not is_empty
            if is_empty:
                on_empty()
        if not found_any and not may_be_empty:
            raise InputError(f"source {self}: empty text; expected more than white space")

    def read_documents(self, text_column: str | None = None) -> list[str]:
        """Return whole documents; order and errors as for `documents`."""
        return ["".join(pieces) for pieces in self.documents(text_column)]

    def read_rows(self, limit: int | None = None, columns: Sequence[str] = ()) -> list[Row]:
        """Return the first ``limit`` rows (None: all); InputError: as `rows`, or there is no row."""
        rows = list(itertools.islice(self.rows(columns), limit))
        if not rows:
            raise InputError(f"source {self} is empty; expected at least one row")
        return rows


def did_you_mean(name: str, names: Iterable[str], n: int = 1) -> str:
    """Return " (did you mean …?)" with the ``n`` nearest names; empty if none is near."""
    near = difflib.get_close_matches(name, list(map(str, itertools.islice(names, 1_000))), n=n, cutoff=0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _split(pieces: Pieces) -> Iterator[Iterator[str]]:
    """Yield the documents of a text: the parts between end-of-text marks that have more than white space."""
    parts = (part for part in _cut_at_marks(pieces) if part != "")
    start: list[str] = []
    for part in parts:
        if part is None:
            start.clear()
            continue
        start.append(part)
        if part.strip():
            document = itertools.chain(start, iter(lambda: next(parts, None), None))  # up to the next mark
            yield document
            deque(document, maxlen=0)  # skip what the caller did not read
            start = []


def _cut_at_marks(pieces: Pieces) -> Iterator[str | None]:
    """Yield the pieces without the marks, and None for each mark, even if it spans pieces."""
    held = ""
    for piece in pieces:
        *ended, last = (held + piece).split(END_OF_TEXT)
        for part in ended:
            yield part
            yield None
        n_held = next((n for n in range(len(END_OF_TEXT) - 1, 0, -1) if last.endswith(END_OF_TEXT[:n])), 0)
        held = last[len(last) - n_held :]
        yield last[: len(last) - n_held]
    yield held
