"""The documents of a source, one after the other, each in pieces, so that no source has to fit into memory."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from slm_jax.data.rows import OnRead, Pieces, Source, ignore_bytes
from slm_jax.errors import InputError
from slm_jax.tokenizer import END_OF_TEXT


def documents(
    source: Source,
    text_column: str | None = None,
    on_read: OnRead = ignore_bytes,
    on_empty: Callable[[], None] = lambda: None,
) -> Iterator[Pieces]:
    """Return the documents of a source, each as an iterator of its pieces, in a fixed order.

    A text file or a row is a document, or several if it holds a literal ``<|endoftext|>``; documents of only white
    space are skipped. A document has to be read before the next one is asked for. Memory holds about a megabyte of a
    text file, one row (of Parquet 64), and the white space that a document starts with.

    ``on_empty`` is called for each file or row without a document; for the other arguments and the errors see
    `Source.texts`. A source without any document is an InputError.
    """
    return _documents(source, source.texts(text_column, on_read), on_empty)


def read_documents(source: Source, text_column: str | None = None) -> list[str]:
    """Return the documents of a source, each whole; arguments, order and errors are those of `documents`."""
    return ["".join(pieces) for pieces in documents(source, text_column)]


def _documents(source: Source, texts: Iterable[Pieces], on_empty: Callable[[], None]) -> Iterator[Pieces]:
    n = 0
    for text in texts:
        n_before = n
        for document in _split(text):
            n += 1
            yield document
        if n == n_before:
            on_empty()
    if not n:
        raise InputError(f"source {source}: empty text; expected more than white space")


def _split(pieces: Iterable[str]) -> Iterator[Pieces]:
    """Yield the documents of a text: what is between literal marks of the end of text and more than white space."""
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
            deque(document, maxlen=0)  # skip what the caller didn't read
            start = []


def _cut_at_marks(pieces: Iterable[str]) -> Iterator[str | None]:
    """Yield the pieces without the marks, and None for each mark, also for one that spans pieces."""
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
