"""Filters of `slm-jax prepare`: Unicode normal forms, removal of copies and of low-quality documents.

The quality measures are the simplest ones of MassiveText (Rae et al. 2021, "Scaling language models").
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from slm_jax.data.rows import Pieces
from slm_jax.errors import InputError
from slm_jax.tokenizer import cut_pieces

LONGEST = 1 << 24  # characters; longer documents are not held in memory
PIECE = 1 << 20  # characters of a longer document held in memory
# Why documents are left out; "unfiltered" ones are too long to be filtered, and are kept.
REASONS = ("empty", "short", "symbols", "repeated_lines", "duplicates", "near_duplicates", "unfiltered")
NormalForm = Literal["NFC", "NFKC"]
_SYMBOL = re.compile(r"[^\w\s]|_")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which documents are left out, and their normal form; see the command's options of the same names."""

    deduplicate: bool = True
    near_duplicates: float | None = None
    min_characters: int = 0
    max_symbol_ratio: float | None = None
    max_repeated_lines: float | None = None
    normalize: NormalForm | None = None

    def reason(self, text: "Text") -> str | None:
        """Return the reason to leave out a document; "unfiltered" if it is too long to check; None: keep it."""
        if not text.is_whole:
            return "unfiltered" if text.is_start else None
        return self.low_quality(text.text) or ("duplicates" if text.is_copy else None)

    def low_quality(self, text: str) -> str | None:
        """Return the reason to leave out a document; None: keep it. Surrounding white space is ignored."""
        text = text.strip()
        if len(text) < self.min_characters:
            return "short"
        if self.max_symbol_ratio is not None:
            n_symbols = len(text) - len(_SYMBOL.sub("", text))
            if n_symbols > self.max_symbol_ratio * len(text):
                return "symbols"
        if self.max_repeated_lines is not None:
            lines = [line for part in text.split("\n") if (line := part.strip())]
            if len(lines) - len(set(lines)) > self.max_repeated_lines * len(lines):
                return "repeated_lines"
        return None


DEFAULT_RULES = Rules()


class Text(NamedTuple):
    """A document, or a piece of one that is too long to be filtered."""

    text: str
    is_start: bool = True
    is_whole: bool = True
    is_copy: bool = False  # equal to an earlier document, even if that one was left out


def digest(text: str) -> bytes:
    """Return 16 bytes that are equal for texts that differ only in surrounding white space."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


def nothing_left(source: str, counts: Mapping[str, int]) -> InputError:
    """Return the error for a source of which all documents were left out."""
    left_out = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts.items() if n)
    return InputError(f"source {source!r}: no document is left ({left_out or 'none read'}); loosen the filter")


def normalized(text: str, form: NormalForm | None) -> str:
    """Return a text in a Unicode normal form; None: unchanged."""
    return text if form is None else unicodedata.normalize(form, text)


def mark_copies(documents: Iterable[Pieces], rules: Rules = DEFAULT_RULES) -> Iterator[Text]:
    """Yield the documents, whole up to 16 million characters; finding copies takes about 100 bytes per document."""
    seen: set[bytes] = set()
    for document in documents:
        pieces = iter(document)
        start: list[str] = []
        n_characters = 0
        while n_characters <= LONGEST and (piece := next(pieces, None)) is not None:
            start.append(piece)
            n_characters += len(piece)
        if n_characters > LONGEST:
            is_start = True
            for piece in cut_pieces(_chain(start, pieces), PIECE):
                yield Text(normalized(piece, rules.normalize), is_start, is_whole=False)
                is_start = False
            continue
        text = normalized("".join(start), rules.normalize)
        key = digest(text) if rules.deduplicate else None
        yield Text(text, is_copy=key in seen)
        if key is not None:
            seen.add(key)


def _chain(start: list[str], rest: Iterator[str]) -> Iterator[str]:
    while start:  # frees each piece once it has been read
        yield start.pop(0)
    yield from rest
