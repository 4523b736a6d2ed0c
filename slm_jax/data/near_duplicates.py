"""Near-duplicate documents, by MinHash (Broder 1997) and locality-sensitive hashing.

A document is represented by the set of its shingles: runs of lower-case words without punctuation and white space. The
share of equal entries in two signatures estimates the Jaccard similarity of the sets (standard error at most 0.045).
Only documents that share a band of entries are compared, each with the first document with this band. So the result
depends on the order of the documents, but not on how they are distributed over processes or machines.
"""

import functools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Shaped, UInt8, UInt32, UInt64

from slm_jax.tokenizer import cut_pieces

SHINGLE = 4  # words
BANDS, ROWS = 32, 4  # of 80% equal shingles, all but one pair in 10,000,000 shares a band; of 20%, 1 in 20
ENTRIES = BANDS * ROWS
_PIECE = 1 << 16  # characters hashed at a time; shingles end there
_BLOCK = 1 << 10  # shingles; fit into the processor's cache
_COMPARED = 1 << 14  # pairs of signatures compared at a time
_BASE = 0x9E3779B97F4A7C15  # any odd number of 64 bits


def _mix(values: UInt64[np.ndarray, "*any"]) -> UInt64[np.ndarray, "*any"]:
    """Scramble each number, one to one, so that all its bits depend on all bits (the end of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# Each entry is the smallest of the shingles' hashes under a hash function of its own: multiply and add.
_MULTIPLIERS = (_mix(np.arange(1, ENTRIES + 1, dtype=np.uint64)) | np.uint64(1)).astype(np.uint32)[:, None]
_OFFSETS = _mix(np.arange(1001, ENTRIES + 1001, dtype=np.uint64)).astype(np.uint32)[:, None]
# Letters and digits, and all bytes of other characters. Each character of Chinese, Japanese and Korean is a word.
_IN_WORD = np.array([chr(byte).isalnum() or byte >= 0x80 for byte in range(256)])
_IS_WORD = np.array([0xE3 <= byte <= 0xED for byte in range(256)])


def signature(text: str) -> UInt32[np.ndarray, " entries"]:
    """Return the MinHash signature of a text."""
    smallest = np.full(ENTRIES, 2**32 - 1, np.uint32)
    for piece in cut_pieces([text.lower()], _PIECE):
        shingles = _shingles(np.frombuffer(piece.encode(), np.uint8))
        for start in range(0, len(shingles), _BLOCK):
            hashes = _MULTIPLIERS * shingles[start : start + _BLOCK] + _OFFSETS
            np.minimum(smallest, hashes.min(axis=1), out=smallest)
    return smallest


def _shingles(data: UInt8[np.ndarray, " bytes"]) -> UInt32[np.ndarray, " shingles"]:
    """Return a hash of each run of `SHINGLE` words; of all of them, if they are fewer."""
    in_word = _IN_WORD[data]
    if not in_word.any():  # only punctuation
        in_word[:] = True
    starts_word = in_word & (~np.append(False, in_word[:-1]) | _IS_WORD[data])
    at = np.append(np.flatnonzero(starts_word[in_word]), np.count_nonzero(in_word))
    powers, inverses = _powers((len(data) - 1).bit_length())
    # The bytes are the coefficients of a polynomial modulo 2^64, so that a difference of two sums is a run's hash.
    sums = np.append(np.uint64(0), np.cumsum((data[in_word] + np.uint64(1)) * powers[: at[-1]]))[at]
    n_words = min(SHINGLE, len(at) - 1)
    hashes = (sums[n_words:] - sums[:-n_words]) * inverses[at[:-n_words]]
    return (_mix(hashes) >> np.uint64(32)).astype(np.uint32)


@functools.lru_cache(maxsize=32)
def _powers(bits: int) -> tuple[UInt64[np.ndarray, " n"], UInt64[np.ndarray, " n"]]:
    """Return the first 2^bits powers of the base and of its inverse, modulo 2^64."""
    exponents = np.full(1 << bits, _BASE, np.uint64), np.full(1 << bits, pow(_BASE, -1, 2**64), np.uint64)
    for each in exponents:
        each[0] = 1
    return np.cumprod(exponents[0]), np.cumprod(exponents[1])


def band_keys(signatures: UInt32[np.ndarray, "documents entries"], band: int) -> UInt64[np.ndarray, " documents"]:
    """Return a number for one of the bands of each signature: equal if its entries are."""
    pairs = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS], np.uint32).view(np.uint64)
    keys = np.zeros(len(signatures), np.uint64)
    for column in pairs.T:
        keys = _mix(keys + column + np.uint64(_BASE))
    return keys


def are_similar(
    first: UInt32[np.ndarray, "pairs entries"], second: UInt32[np.ndarray, "pairs entries"], threshold: float
) -> Bool[np.ndarray, " pairs"]:
    """Return whether at least the share ``threshold`` of the entries of each pair is equal."""
    return np.count_nonzero(first == second, axis=1) >= threshold * ENTRIES


def find_near_duplicates(
    signatures: UInt32[np.ndarray, "documents entries"], threshold: float
) -> Bool[np.ndarray, " documents"]:
    """Return which documents are similar to an earlier one: in one of the bands, to the first with the same band."""
    n = len(signatures)
    found = np.zeros(n, bool)
    for band in range(BANDS if n else 0):
        keys = band_keys(signatures, band)
        order = np.argsort(keys, kind="stable")
        is_first = np.append(True, np.diff(keys[order]) != 0)
        first = order[np.maximum.accumulate(np.where(is_first, np.arange(n), 0))]
        candidates = np.flatnonzero(~is_first & ~found[order])
        for chunk in _chunks(candidates):
            later, earlier = order[chunk], first[chunk]
            found[later] = are_similar(signatures[later], signatures[earlier], threshold)
    return found


def _chunks(items: Shaped[np.ndarray, " n"]) -> Iterable[Shaped[np.ndarray, " chunk"]]:
    return (items[start : start + _COMPARED] for start in range(0, len(items), _COMPARED))
