"""The last steps of the Apache Beam pipeline in :mod:`slm_jax.data.beam`: documents become shards of shuffled ids."""

import functools
import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_jax.data.filters import DEFAULT_RULES, REASONS
from slm_jax.data.parts import Job, encode_text
from slm_jax.data.token_file import describe, sha256_of_shards, shard_path, token_dtype
from slm_jax.errors import InputError
from slm_jax.tokenizer import Tokenizer, tokenizer_from_dict

KEPT = "kept"

Document = tuple[int, str]  # its number, and its text
Encoded = tuple[int, bytes, int]  # place in the shuffled order, below 2^63; ids, from the end-of-text id on; text bytes


class Shard(NamedTuple):
    """A shard that was written: its number, its file, and what the index says about it."""

    number: int
    path: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str


def encode(document: Document, source: str, tokenizer: str) -> Encoded:
    """Return what is written of a document."""
    number, text = document
    place = int.from_bytes(hashlib.blake2b(number.to_bytes(8, "big"), digest_size=8).digest(), "big") >> 1
    return place, encode_text(Job(source, DEFAULT_RULES, read_tokenizer(tokenizer)), text).tobytes(), len(text.encode())


@functools.lru_cache(maxsize=1)
def read_tokenizer(text: str) -> Tokenizer:
    """Read a tokenizer that travels as JSON."""
    return tokenizer_from_dict(json.loads(text))


def place_of(encoded: Encoded) -> int:
    """Return the place in the shuffled order."""
    return encoded[0]


def count_bytes(encoded: Encoded) -> int:
    """Return the bytes of the ids."""
    return len(encoded[1])


def smallest(places: Iterable[int]) -> int:
    """Return the first of some places; 0 without any."""
    return min(places, default=0)


def count_shards(n_bytes: int, shard_tokens: int, itemsize: int) -> int:
    """Return the number of shards for so many bytes of ids."""
    return max(1, -(-n_bytes // (shard_tokens * itemsize)))


def to_shard(encoded: Encoded, n_shards: int) -> tuple[int, Encoded | None]:
    """Return the shard of a document, with the document."""
    return encoded[0] * n_shards >> 63, encoded


def empty_shards(n_shards: int) -> Iterator[tuple[int, Encoded | None]]:
    """Return every shard once, so that none is missing."""
    return ((number, None) for number in range(n_shards))


def write_shard(group: tuple[int, Iterable[Encoded | None]], partial: str, dtype: str, first: int) -> Shard:
    """Write a shard beside the token file."""
    from apache_beam.io.filesystems import FileSystems

    number, found = group
    documents = sorted(each for each in found if each is not None)
    content, tokens = hashlib.sha256(), 0
    path = f"{partial}-{number:05}-{uuid.uuid4().hex[:8]}"  # a runner may try again before the first try has ended
    with FileSystems.create(path) as file:
        for place, ids, _ in documents:
            ids = ids[np.dtype(dtype).itemsize :] if place == first else ids  # the end-of-text id is between documents
            file.write(ids)
            content.update(ids)
            tokens += len(ids) // np.dtype(dtype).itemsize
    return Shard(number, path, tokens, len(documents), sum(each[2] for each in documents), content.hexdigest())


def write_index(
    source: str, out: str, tokenizer: str, shards: list[Shard], counts: dict[str, int], n_distinct: int, n_left: int
) -> None:
    """Give the shards their names, and write what describes them."""
    from apache_beam.io.filesystems import FileSystems

    shards = sorted(shards)
    by_reason = {reason: counts.get(reason, 0) for reason in REASONS}
    by_reason |= {"duplicates": counts.get(KEPT, 0) - n_distinct, "near_duplicates": n_distinct - n_left}
    if not sum(shard.tokens for shard in shards):
        left_out = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in by_reason.items() if n)
        FileSystems.delete([shard.path for shard in shards])
        raise InputError(f"source {source!r}: no document is left ({left_out or 'none read'}); loosen the filter")
    folder, slash, name = out.rpartition("/")
    for shard in shards:
        path = f"{folder}{slash}{shard_path(Path(name), shard.number)}"
        if FileSystems.exists(shard.path):  # else it was renamed before this step was tried again
            if FileSystems.exists(path):
                FileSystems.delete([path])
            FileSystems.rename([shard.path], [path])
    ids = {
        "dtype": token_dtype(read_tokenizer(tokenizer).vocab_size).name,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "text_bytes": sum(shard.text_bytes for shard in shards),
        "counts": by_reason,
        "sha256": sha256_of_shards([shard.sha256 for shard in shards]),
        "shards": [{"tokens": shard.tokens, "sha256": shard.sha256} for shard in shards],
    }
    with FileSystems.create(f"{out}.json") as file:
        file.write(describe(read_tokenizer(tokenizer), source, ids).encode())
