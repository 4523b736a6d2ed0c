"""From sources of text to a token file, once, in memory that does not grow with the text.

A document is encoded in pieces, on several cores; the ids are those of encoding it whole. Before that, copies and
documents of low quality are left out, by the simplest of the measures that MassiveText used (Rae et al. 2021, "Scaling
language models").
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from slm_jax.data.rows import Pieces, Source
from slm_jax.data.token_file import TokenWriter, token_dtype, write_token_file
from slm_jax.errors import InputError
from slm_jax.tokenizer import BPETokenizer, Tokenizer, cut_pieces

LONGEST = 1 << 24  # characters; longer documents are not held in memory
# Why documents are left out; those that are unfiltered, because they are longer, are kept.
REASONS = ("empty", "short", "symbols", "repeated_lines", "duplicates", "unfiltered")
TRAINING_CHARACTERS = 100_000_000  # of the text that a tokenizer is trained on
PIECE = 1 << 20  # characters encoded at a time
_MOST_WORKERS = 8  # more would wait: one thread reads and filters
_SYMBOL = re.compile(r"[^\w\s]|_")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which documents are left out; the command's options of the same names describe each rule."""

    deduplicate: bool = True
    min_characters: int = 0
    max_symbol_ratio: float | None = None
    max_repeated_lines: float | None = None


def prepare(
    sources: Sequence[Source],
    out: Path,
    tokenizer: Tokenizer,
    *,
    text_column: str | None = None,
    rules: Rules = Rules(),
    report: Callable[[TokenWriter], None] = lambda _: None,
) -> TokenWriter:
    """Encode sources, one after the other, into a token file (`slm_jax.data.token_file`); return its counts.

    ``report`` is called now and then with what has been written so far.

    Raises:
        InputError: a source that cannot be read, or has no text that the rules keep; a text that the tokenizer cannot
            encode; a file that cannot be written. Nothing is left behind.
    """
    tokenizer.encode("")  # raises if the tokenizer's files are missing, before anything is read
    source, counts = " ".join(map(str, sources)), dict.fromkeys(REASONS, 0)
    read: list[int] = []

    def count_empty() -> None:
        counts["empty"] += 1

    # A list, so that missing files are reported at once.
    found = itertools.chain.from_iterable([each.documents(text_column, read.append, count_empty) for each in sources])
    batches = _batches(select(found, rules, counts), read)
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    with write_token_file(out, tokenizer, source) as file, ThreadPoolExecutor(workers) as pool:
        file.counts = counts
        encoded = _in_order(pool, partial(_encode, tokenizer, source), batches, ahead=workers + 1)
        for ids, documents, text_bytes, bytes_read in encoded:
            # The end-of-text id is between documents, not before the first.
            file.write(ids if file.tokens else ids[1:])
            file.documents += documents
            file.text_bytes += text_bytes
            file.bytes_read += bytes_read
            report(file)
        if not file.tokens:
            left_out = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts.items() if n)
            raise InputError(f"source {source!r}: no document is left ({left_out or 'none read'}); loosen the filter")
    return file


def train_tokenizer(
    sources: Sequence[Source],
    vocab_size: int,
    text_column: str | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> BPETokenizer:
    """Train a byte-level BPE on the first 100 million characters; ``report`` gets the number of those read so far."""

    def first() -> Iterator[str]:
        n_read = 0
        for document in itertools.chain.from_iterable([source.documents(text_column) for source in sources]):
            for piece in cut_pieces(document, PIECE):
                yield piece
                n_read += len(piece)
                report(n_read)
                if n_read >= TRAINING_CHARACTERS:
                    return

    return BPETokenizer.train(first(), vocab_size)


def select(documents: Iterable[Pieces], rules: Rules, counts: dict[str, int]) -> Iterator[Pieces]:
    """Yield the documents that are kept, and count the others by reason; remembers about 100 bytes per document."""
    seen: set[bytes] = set()
    for document in documents:
        pieces = iter(document)
        start: list[str] = []
        n_characters = 0
        while n_characters <= LONGEST and (piece := next(pieces, None)) is not None:
            start.append(piece)
            n_characters += len(piece)
        reason = "unfiltered" if n_characters > LONGEST else _reason("".join(start), rules, seen)
        if reason is not None:
            counts[reason] += 1
        if reason in (None, "unfiltered"):
            yield itertools.chain(start, pieces)


def _reason(text: str, rules: Rules, seen: set[bytes]) -> str | None:
    if len(text) < rules.min_characters:
        return "short"
    if rules.max_symbol_ratio is not None:
        n_symbols = len(text) - len(_SYMBOL.sub("", text))
        if n_symbols > rules.max_symbol_ratio * len(text):
            return "symbols"
    if rules.max_repeated_lines is not None:
        lines = [line for part in text.split("\n") if (line := part.strip())]
        if len(lines) - len(set(lines)) > rules.max_repeated_lines * len(lines):
            return "repeated_lines"
    if rules.deduplicate:
        digest = hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
        if digest in seen:
            return "duplicates"
        seen.add(digest)
    return None


Batch = tuple[list[str | None], int]  # pieces, each document after None; and the bytes of files read for them
Encoded = tuple[np.ndarray, int, int, int]  # ids, each document's after an end-of-text id; documents, text bytes, read


def _batches(found: Iterable[Pieces], read: list[int]) -> Iterator[Batch]:
    """Group short pieces: starting a thread pays off from about a megabyte; ``read`` collects the bytes read for it."""
    batch: list[str | None] = []
    n_characters = 0
    for document in found:
        batch.append(None)
        for text in cut_pieces(document, PIECE):
            batch.append(text)
            n_characters += len(text)
            if n_characters >= PIECE:
                yield batch, sum(read)
                read.clear()
                batch, n_characters = [], 0
    if batch:
        yield batch, sum(read)


def _encode(tokenizer: Tokenizer, source: str, batch: Batch) -> Encoded:
    pieces, bytes_read = batch
    ids: list[int] = []
    text_bytes = 0
    for text in pieces:
        if text is None:
            ids.append(tokenizer.eot_id)
            continue
        try:
            ids += tokenizer.encode(text)
        except InputError as error:
            raise InputError(f"source {source!r}: in {text.strip()[:40]!r} …: {error}") from None
        text_bytes += len(text.encode())
    return np.array(ids, token_dtype(tokenizer.vocab_size)), pieces.count(None), text_bytes, bytes_read


def _in_order(
    pool: ThreadPoolExecutor, encode: Callable[[Batch], Encoded], batches: Iterable[Batch], ahead: int
) -> Iterator[Encoded]:
    """Yield the encoded batches in order; at most ``ahead`` of them wait."""
    waiting: deque[Future[Encoded]] = deque()
    for batch in batches:
        waiting.append(pool.submit(encode, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()
