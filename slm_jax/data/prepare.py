"""From a text source to a token file, once, in memory that does not grow with the text.

A document is encoded in pieces, on several cores. The ids are those of encoding it whole, because it is cut only before
white space that follows something else, where every tokenizer of this package starts a new word.
"""

import dataclasses
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
class Progress:
    """How far it has come.

    Attributes:
        bytes_read: of files, as they lie there.
        documents: that were kept.
        tokens: ids that were written.
        text_bytes: of these documents, in UTF-8.
    """

    bytes_read: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def told(self, n_bytes: int) -> None:
        """Count what was read."""
        self.bytes_read += n_bytes


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        documents: with the end-of-text id between them.
        tokens: ids in the file.
        text_bytes: of the documents, in UTF-8.
        counts: documents that were left out, by reason, and those unfiltered (`DocumentFilter`).
        sha256: of the file.
        seconds: that it took.
    """

    documents: int
    tokens: int
    text_bytes: int
    counts: dict[str, int]
    sha256: str
    seconds: float


class _Segment(NamedTuple):
    """Text to encode at once, and whether a document begins with it."""

    text: str
    begins: bool


class _Encoded(NamedTuple):
    ids: np.ndarray
    n_documents: int
    n_bytes: int


def prepare(
    source: str,
    out: Path,
    tokenizer: Tokenizer,
    *,
    text_column: str | None = None,
    rules: Rules | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Prepared:
    """Encode a source into a token file (`slm_jax.data.token_file`).

    Args:
        source: any text source (`slm_jax.data.documents`).
        out: ``FILE.bin``, which is replaced if it is there; ``FILE.bin.json`` is written beside it.
        tokenizer: makes the ids; is kept in the JSON file.
        text_column: of rows.
        rules: what is left out; default: exact copies. Documents longer than 16 million characters are always kept.
        report: called now and then.

    Raises:
        InputError: a source that cannot be read, has no text or none that the rules keep, or that the tokenizer cannot
            encode; a file that cannot be written. Nothing is left behind.
    """
    start = time.monotonic()
    tokenizer.encode("")  # finds out that its files are missing before anything is read
    document_filter, progress = DocumentFilter(rules or Rules()), Progress()
    kept = document_filter.select(documents(source, text_column, progress.told))

    def encode(batch: list[_Segment]) -> _Encoded:
        return _encode(batch, tokenizer, source)

    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    with write_token_file(out, tokenizer, source) as file, ThreadPoolExecutor(workers) as pool:
        for encoded in _in_order(pool, encode, _batches(_segments(kept)), ahead=workers + 1):
            file.write(encoded.ids if file.tokens else encoded.ids[1:])  # the id is between documents, not before
            progress.documents += encoded.n_documents
            progress.text_bytes += encoded.n_bytes
            progress.tokens = file.tokens
            report(progress)
        counts = document_filter.counts
        if not file.tokens:
            raise InputError(f"source {source!r}: no document is left ({_describe(counts)}); loosen the filter")
        file.documents, file.counts = progress.documents, counts
    return Prepared(
        progress.documents, progress.tokens, progress.text_bytes, counts, file.sha256, time.monotonic() - start
    )


def train_tokenizer(source: str, vocab_size: int, text_column: str | None = None) -> BPETokenizer:
    """Train a byte-level BPE on the first 100 million characters of a source."""
    return BPETokenizer.train(_first(documents(source, text_column), TRAINING_CHARACTERS), vocab_size)


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


def _first(all_documents: Iterable[Iterable[str]], n_characters: int) -> Iterator[str]:
    for document in all_documents:
        for piece in cut_pieces(document):
            yield piece
            n_characters -= len(piece)
            if n_characters <= 0:
                return


def _segments(all_documents: Iterable[Iterable[str]]) -> Iterator[_Segment]:
    for document in all_documents:
        for i, text in enumerate(cut_pieces(document)):
            yield _Segment(text, begins=i == 0)


def _batches(segments: Iterable[_Segment]) -> Iterator[list[_Segment]]:
    """Put short segments together: a thread is worth its while for about a megabyte."""
    batch: list[_Segment] = []
    n_characters = 0
    for segment in segments:
        batch.append(segment)
        n_characters += len(segment.text)
        if n_characters >= _PIECE:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[_Segment], tokenizer: Tokenizer, source: str) -> _Encoded:
    ids: list[int] = []
    try:
        for text, begins in batch:
            if begins:
                ids.append(tokenizer.eot_id)
            ids += tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"source {source!r}: in {text.strip()[:40]!r} …: {error}") from None
    n_bytes = sum(len(segment.text.encode()) for segment in batch)
    return _Encoded(np.array(ids, token_dtype(tokenizer.vocab_size)), sum(segment.begins for segment in batch), n_bytes)


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[list[_Segment]], _Encoded],
    batches: Iterable[list[_Segment]],
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
