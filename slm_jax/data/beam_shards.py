"""The last steps of the Apache Beam pipeline in :mod:`slm_jax.data.beam`: documents become shards of shuffled ids."""

import hashlib
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from slm_jax.data.filters import REASONS, nothing_left
from slm_jax.data.parts import Job, encode_text
from slm_jax.data.token_file import describe, sha256_of_shards, shard_path, token_dtype

KEPT = "kept"

Document = tuple[int, str]  # number and text
Encoded = tuple[int, bytes, int]  # place in the shuffled order, below 2^63; ids, from the end-of-text id on; text bytes


class Shard(NamedTuple):
    """A shard that was written: number, file, and what the index needs to know."""

    number: int
    path: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str


def encode(document: Document, job: Job) -> Encoded:
    """Encode a document."""
    number, text = document
    place = int.from_bytes(hashlib.blake2b(number.to_bytes(8, "big"), digest_size=8).digest(), "big") >> 1
    return place, encode_text(job, text).tobytes(), len(text.encode())


def to_shard(encoded: Encoded, n_bytes: int, most_bytes: int) -> tuple[int, Encoded]:
    """Return the number of a document's shard, and the document; shards are ordered, of about ``most_bytes``."""
    return encoded[0] * -(-n_bytes // most_bytes) >> 63, encoded


def write_shard(group: tuple[int, Iterable[Encoded]], folder: str, itemsize: int, first: list[int]) -> Shard:
    """Write a shard into a folder; ``first`` has the place of the very first document."""
    from apache_beam.io.filesystems import FileSystems

    number, documents = group[0], sorted(group[1])
    content, n_bytes = hashlib.sha256(), 0
    path = f"{folder}/{number:05}-{uuid.uuid4().hex[:8]}"  # unique: a runner may retry while the first still runs
    with FileSystems.create(path) as file:
        for place, ids, _ in documents:
            data = ids[itemsize:] if [place] == first else ids  # the end-of-text id is between documents
            file.write(data)
            content.update(data)
            n_bytes += len(data)
    text_bytes = sum(text_bytes for _, _, text_bytes in documents)
    return Shard(number, path, n_bytes // itemsize, len(documents), text_bytes, content.hexdigest())


def write_index(job: Job, out: str, shards: list[Shard], counts: dict[str, int], n_distinct: int, n_left: int) -> None:
    """Rename the shards, and write the index. InputError: there are no shards."""
    from apache_beam.io.filesystems import FileSystems

    by_reason = {reason: counts.get(reason, 0) for reason in REASONS}
    by_reason |= {"duplicates": counts.get(KEPT, 0) - n_distinct, "near_duplicates": n_distinct - n_left}
    if not shards:
        raise nothing_left(job.source, by_reason)
    shards = sorted(shards)
    folder, slash, name = out.rpartition("/")
    for i, shard in enumerate(shards):
        path = f"{folder}{slash}{shard_path(Path(name), i)}"
        if FileSystems.exists(shard.path):  # else an earlier attempt of this step renamed it
            if FileSystems.exists(path):
                FileSystems.delete([path])
            FileSystems.rename([shard.path], [path])
    ids = {
        "dtype": token_dtype(job.tokenizer.vocab_size).name,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "text_bytes": sum(shard.text_bytes for shard in shards),
        "counts": by_reason,
        "sha256": sha256_of_shards([shard.sha256 for shard in shards]),
        "shards": [{"tokens": shard.tokens, "sha256": shard.sha256} for shard in shards],
    }
    with FileSystems.create(f"{out}.json") as file:
        file.write(describe(job.tokenizer, job.source, ids).encode())
