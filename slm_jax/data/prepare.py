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
from slm_jax.data.rows import Pieces, Source
from slm_jax.data.token_file import token_dtype, write_token_file
from slm_jax.errors import InputError
from slm_jax.tokenizer import BPETokenizer, Tokenizer

TRAINING_CHARACTERS = 100_000_000  # of the text that a tokenizer is trained on
_PIECE = 1 << 20  # characters encoded at a time
_MOST_WORKERS = 8  # more would wait: one thread reads and filters
_LAST_CUT = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)


@dataclasses.dataclass
class Prepared:
    """What has been written so far.

    Attributes:
        bytes_read: bytes read from the source's files.
        documents: number of documents, with the end-of-text id between them.
        tokens: number of ids in the file.
        text_bytes: size of the documents in UTF-8.
        counts: documents that were left out, by reason, and those unfiltered (`DocumentFilter`).
        sha256: SHA-256 of the file, set at the end.
        seconds: time taken, set at the end.
    """

    bytes_read: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    sha256: str = ""
    seconds: float = 0.0


class _Piece(NamedTuple):
    """Text to encode at once, and whether a document begins with it."""

    text: str
    begins: bool


class _Batch(NamedTuple):
    """Pieces, and the bytes of files that were read for them."""

    pieces: list[_Piece]
    bytes_read: int


def prepare(
    sources: Sequence[Source],
    out: Path,
    tokenizer: Tokenizer,
    *,
    text_column: str | None = None,
    rules: Rules | None = None,
    report: Callable[[Prepared], None] = lambda _: None,
) -> Prepared:
    """Encode sources, one after the other, into a token file (`slm_jax.data.token_file`).

    Args:
        sources: any sources of texts or rows.
        out: ``FILE.bin``, replaced if it exists; ``FILE.bin.json`` is written beside it.
        tokenizer: makes the ids; saved in the JSON file.
        text_column: the field of the texts, in sources of rows.
        rules: which documents are left out; default: exact copies. Documents of more than 16 million characters are
            always kept.
        report: called now and then with what has been written so far.

    Raises:
        InputError: a source that cannot be read, or has no text that the rules keep; a text that the tokenizer cannot
            encode; a file that cannot be written. Nothing is left behind.
    """
    start = time.monotonic()
    tokenizer.encode("")  # raises if the tokenizer's files are missing, before anything is read
    source = " ".join(map(str, sources))
    document_filter = DocumentFilter(rules or Rules())
    read: list[int] = []
    on_empty = partial(document_filter.count, "empty")
    # A list, so that missing files are reported at once.
    found = itertools.chain.from_iterable([documents(each, text_column, read.append, on_empty) for each in sources])
    batches = _batches(document_filter.select(found), read)
    prepared = Prepared(counts=document_filter.counts)
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    with write_token_file(out, tokenizer, source) as file, ThreadPoolExecutor(workers) as pool:
        encode = partial(_encode, tokenizer=tokenizer, source=source)
        for batch, ids in _in_order(pool, encode, batches, ahead=workers + 1):
            file.write(ids if file.tokens else ids[1:])  # the end-of-text id is between documents, not before
            prepared.documents += sum(piece.begins for piece in batch.pieces)
            prepared.text_bytes += sum(len(piece.text.encode()) for piece in batch.pieces)
            prepared.bytes_read += batch.bytes_read
            prepared.tokens = file.tokens
            report(prepared)
        if not file.tokens:
            left_out = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in prepared.counts.items() if n)
            raise InputError(f"source {source!r}: no document is left ({left_out or 'none read'}); loosen the filter")
        file.documents, file.counts = prepared.documents, prepared.counts
    prepared.sha256, prepared.seconds = file.sha256, time.monotonic() - start
    return prepared


def train_tokenizer(
    sources: Sequence[Source],
    vocab_size: int,
    text_column: str | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> BPETokenizer:
    """Train a byte-level BPE on the first 100 million characters; ``report`` gets the number of those read so far."""

    def first() -> Iterator[str]:
        n_read = 0
        for document in itertools.chain.from_iterable([documents(source, text_column) for source in sources]):
            for piece in cut_pieces(document):
                yield piece
                n_read += len(piece)
                report(n_read)
                if n_read >= TRAINING_CHARACTERS:
                    return

    return BPETokenizer.train(first(), vocab_size)


def cut_pieces(pieces: Iterable[str], length: int = _PIECE) -> Iterator[str]:
    """Join and cut a document again, so that its pieces can be encoded one by one.

    Pieces have about ``length`` characters, at most twice as many, unless a longer run of text has no place to cut.
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


def _batches(found: Iterable[Pieces], read: list[int]) -> Iterator[_Batch]:
    """Group short pieces: starting a thread pays off from about a megabyte of text.

    ``read`` collects the bytes that are read meanwhile, and is emptied at each batch.
    """
    batch: list[_Piece] = []
    n_characters = 0
    for document in found:
        for i, text in enumerate(cut_pieces(document)):
            batch.append(_Piece(text, begins=i == 0))
            n_characters += len(text)
            if n_characters >= _PIECE:
                yield _Batch(batch, sum(read))
                read.clear()
                batch, n_characters = [], 0
    if batch:
        yield _Batch(batch, sum(read))


def _encode(batch: _Batch, tokenizer: Tokenizer, source: str) -> np.ndarray:
    ids: list[int] = []
    try:
        for text, begins in batch.pieces:
            if begins:
                ids.append(tokenizer.eot_id)
            ids += tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"source {source!r}: in {text.strip()[:40]!r} …: {error}") from None
    return np.array(ids, token_dtype(tokenizer.vocab_size))


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[_Batch], np.ndarray], batches: Iterable[_Batch], ahead: int
) -> Iterator[tuple[_Batch, np.ndarray]]:
    """Yield batches with their results, in order; at most ``ahead`` batches wait."""
    waiting: deque[tuple[_Batch, Future[np.ndarray]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(work, batch)))
        if len(waiting) > ahead:
            done, result = waiting.popleft()
            yield done, result.result()
    for done, result in waiting:
        yield done, result.result()
