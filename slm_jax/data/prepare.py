"""From a text source to a token file, once, in memory that does not grow with the text.

A document is encoded in pieces, on several cores. The ids are those of encoding it whole, because it is cut only before
white space that follows something else, where every tokenizer of this package starts a new word.
"""

import dataclasses
import itertools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_jax.data.documents import documents
from slm_jax.data.filters import DocumentFilter, Rules
from slm_jax.data.token_file import token_dtype, write_token_file
from slm_jax.errors import InputError
from slm_jax.tokenizer import BPETokenizer, Tokenizer

TRAINING_CHARACTERS = 100_000_000  # of the text that a tokenizer is trained on
_PIECE = 1 << 20  # characters encoded at a time
_MOST_WORKERS = 8  # more only wait: reading and filtering is one thread's work
_LAST_CUT = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)


@dataclasses.dataclass
class Prepared:
    """What was written so far.

    Attributes:
        bytes_read: of the source's files, as they lie there.
        documents: with the end-of-text id between them.
        tokens: ids in the file.
        text_bytes: of the documents, in UTF-8.
        counts: documents that were left out, by reason, and those unfiltered (`DocumentFilter`).
        sha256: of the file; empty before all is written.
        seconds: that all took.
    """

    bytes_read: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    sha256: str = ""
    seconds: float = 0.0


class _Segment(NamedTuple):
    """Text to encode at once, and whether a document begins with it."""

    text: str
    begins: bool


class _Batch(NamedTuple):
    """Segments, and the bytes of files that were read for them."""

    segments: list[_Segment]
    bytes_read: int


class _Encoded(NamedTuple):
    ids: np.ndarray
    documents: int
    text_bytes: int
    bytes_read: int


def prepare(
    sources: Sequence[str],
    out: Path,
    tokenizer: Tokenizer,
    *,
    text_column: str | None = None,
    rules: Rules | None = None,
    report: Callable[[Prepared], None] = lambda _: None,
) -> Prepared:
    """Encode sources, one after the other, into a token file (`slm_jax.data.token_file`).

    Args:
        sources: any text sources (`slm_jax.data.documents`).
        out: ``FILE.bin``, which is replaced if it is there; ``FILE.bin.json`` is written beside it.
        tokenizer: makes the ids; is kept in the JSON file.
        text_column: of rows.
        rules: what is left out; default: exact copies. Documents longer than 16 million characters are always kept.
        report: called now and then, with what was written so far.

    Raises:
        InputError: a source that cannot be read, has no text or none that the rules keep, or that the tokenizer cannot
            encode; a file that cannot be written. Nothing is left behind.
    """
    start = time.monotonic()
    tokenizer.encode("")  # finds out that its files are missing before anything is read
    source = " ".join(sources)
    document_filter = DocumentFilter(rules or Rules())
    told: list[int] = []
    passed_over = partial(document_filter.count, "empty")
    # A list, as each source finds out at once whether its files are there.
    found = itertools.chain.from_iterable([documents(each, text_column, told.append, passed_over) for each in sources])
    batches = _batches(_segments(document_filter.select(found)), told)
    encode = partial(_encode, tokenizer=tokenizer, source=source)
    prepared = Prepared(counts=document_filter.counts)
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    with write_token_file(out, tokenizer, source) as file, ThreadPoolExecutor(workers) as pool:
        for encoded in _in_order(pool, encode, batches, ahead=workers + 1):
            file.write(encoded.ids if file.tokens else encoded.ids[1:])  # the id is between documents, not before
            prepared.documents += encoded.documents
            prepared.text_bytes += encoded.text_bytes
            prepared.bytes_read += encoded.bytes_read
            prepared.tokens = file.tokens
            report(prepared)
        if not file.tokens:
            raise InputError(
                f"source {source!r}: no document is left ({_describe(prepared.counts)}); loosen the filter"
            )
        file.documents, file.counts = prepared.documents, prepared.counts
    prepared.sha256, prepared.seconds = file.sha256, time.monotonic() - start
    return prepared


def train_tokenizer(
    sources: Sequence[str],
    vocab_size: int,
    text_column: str | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> BPETokenizer:
    """Train a byte-level BPE on the first 100 million characters of sources.

    Args:
        sources: read one after the other, as :func:`slm_jax.data.documents.documents` does.
        vocab_size: how many tokens it has at most.
        text_column: the column of the texts, in sources that have columns.
        report: is told, again and again, how many characters were read so far.
    """
    found = itertools.chain.from_iterable([documents(source, text_column) for source in sources])
    return BPETokenizer.train(_first(found, TRAINING_CHARACTERS, report), vocab_size)


def cut_pieces(pieces: Iterable[str], length: int = _PIECE) -> Iterator[str]:
    """Join and cut a document again, so that its pieces can be encoded one by one.

    Pieces have about ``length`` characters, and no more than twice as many, except where a longer run of text has no
    place to cut: it is kept whole.
    """
    held: list[str] = []
    n_held = 0
    for piece in pieces:
        for start in range(0, len(piece), length):
            part = piece[start : start + length]
            before = held[-1][-1] if held else ""
            held.append(part)
            n_held += len(part)
            if n_held > length and (cut := _LAST_CUT.match(before + part)):
                rest = part[cut.end() - len(before) :]
                held[-1] = part[: len(part) - len(rest)]
                yield "".join(held)
                held, n_held = [rest], len(rest)
    if held:
        yield "".join(held)


def _first(all_documents: Iterable[Iterable[str]], n_characters: int, report: Callable[[int], None]) -> Iterator[str]:
    n_read = 0
    for document in all_documents:
        for piece in cut_pieces(document):
            yield piece
            n_read += len(piece)
            report(n_read)
            if n_read >= n_characters:
                return


def _segments(all_documents: Iterable[Iterable[str]]) -> Iterator[_Segment]:
    for document in all_documents:
        for i, text in enumerate(cut_pieces(document)):
            yield _Segment(text, begins=i == 0)


def _batches(segments: Iterable[_Segment], told: list[int]) -> Iterator[_Batch]:
    """Put short segments together: a thread is worth its while for about a megabyte.

    ``told`` fills with the bytes that are read meanwhile, and is emptied at each batch.
    """
    batch: list[_Segment] = []
    n_characters = 0
    for segment in segments:
        batch.append(segment)
        n_characters += len(segment.text)
        if n_characters >= _PIECE:
            yield _Batch(batch, sum(told))
            told.clear()
            batch, n_characters = [], 0
    if batch:
        yield _Batch(batch, sum(told))


def _encode(batch: _Batch, tokenizer: Tokenizer, source: str) -> _Encoded:
    ids: list[int] = []
    try:
        for text, begins in batch.segments:
            if begins:
                ids.append(tokenizer.eot_id)
            ids += tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"source {source!r}: in {text.strip()[:40]!r} …: {error}") from None
    return _Encoded(
        np.array(ids, token_dtype(tokenizer.vocab_size)),
        documents=sum(segment.begins for segment in batch.segments),
        text_bytes=sum(len(segment.text.encode()) for segment in batch.segments),
        bytes_read=batch.bytes_read,
    )


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[_Batch], _Encoded],
    batches: Iterable[_Batch],
    ahead: int,
) -> Iterator[_Encoded]:
    """Yield the results in the order of the batches, of which no more than ``ahead`` wait."""
    waiting: deque[Future[_Encoded]] = deque()
    for batch in batches:
        waiting.append(pool.submit(work, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _describe(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts.items() if n) or "there was none"
