"""Filters for documents: exact copies and low quality.

The quality measures are the simplest of those that MassiveText used (Rae et al. 2021, "Scaling language models").
"""

import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

LONGEST = 1 << 24  # characters; longer documents are not held in memory
_SYMBOL = re.compile(r"[^\w\s]|_")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which documents are left out.

    Attributes:
        deduplicate: whether to leave out copies of an earlier document (white space at the ends is ignored).
        min_characters: length below which a document is left out.
        max_symbol_ratio: largest share of characters that are neither letters nor digits nor white space; None: any.
        max_repeated_lines: largest share of lines that repeat an earlier one, not counting empty ones; None: any.
    """

    deduplicate: bool = True
    min_characters: int = 0
    max_symbol_ratio: float | None = None
    max_repeated_lines: float | None = None


class DocumentFilter:
    """Applies rules to documents in their order; remembers a digest of each, which takes about 100 bytes.

    Attributes:
        counts: number of documents left out, by reason: ``empty`` (counted by the reader), ``short``, ``symbols``,
            ``repeated_lines``, ``duplicates``; and the number of ``unfiltered`` documents, which are longer than
            `LONGEST` and always kept.
    """

    def __init__(self, rules: Rules) -> None:
        self.counts = dict.fromkeys(("empty", "short", "symbols", "repeated_lines", "duplicates", "unfiltered"), 0)
        self._rules = rules
        self._seen: set[bytes] = set()

    def count(self, reason: str) -> None:
        """Count one more document."""
        self.counts[reason] += 1

    def select(self, documents: Iterable[Iterable[str]]) -> Iterator[Iterator[str]]:
        """Yield the documents that are kept; a document is an iterator of its pieces."""
        for document in documents:
            pieces = iter(document)
            start: list[str] = []
            n_characters = 0
            while n_characters <= LONGEST and (piece := next(pieces, None)) is not None:
                start.append(piece)
                n_characters += len(piece)
            reason = "unfiltered" if n_characters > LONGEST else self._reason("".join(start))
            if reason is not None:
                self.count(reason)
            if reason in (None, "unfiltered"):
                yield itertools.chain(start, pieces)

    def _reason(self, text: str) -> str | None:
        rules = self._rules
        if len(text) < rules.min_characters:
            return "short"
        if rules.max_symbol_ratio is not None and _symbol_ratio(text) > rules.max_symbol_ratio:
            return "symbols"
        if rules.max_repeated_lines is not None and _repeated_lines(text) > rules.max_repeated_lines:
            return "repeated_lines"
        return "duplicates" if rules.deduplicate and self._is_copy(text) else None

    def _is_copy(self, text: str) -> bool:
        n_before = len(self._seen)
        self._seen.add(hashlib.blake2b(text.strip().encode(), digest_size=16).digest())
        return len(self._seen) == n_before


def _symbol_ratio(text: str) -> float:
    return (len(text) - len(_SYMBOL.sub("", text))) / max(1, len(text))


def _repeated_lines(text: str) -> float:
    lines = [line for part in text.split("\n") if (line := part.strip())]
    return sum(n - 1 for n in Counter(lines).values()) / max(1, len(lines))
