"""Parts of a text, each encoded into its own file until all are complete, so that a killed run can resume."""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt, UInt32

from slm_jax.data.filters import PIECE, REASONS, Rules, Text
from slm_jax.data.near_duplicates import ENTRIES, signature
from slm_jax.data.token_file import token_dtype
from slm_jax.errors import InputError
from slm_jax.files import replacing
from slm_jax.tokenizer import Tokenizer, cut_pieces, fingerprint, tokenizer_from_dict

VERSION = 1  # version of these files and of their content
_MOST_THREADS = 8  # more would wait for the one thread that reads


@dataclasses.dataclass(frozen=True)
class Job:
    """What all parts share; ``source`` is only for messages. Can be pickled for other processes and machines."""

    source: str
    rules: Rules
    tokenizer: Tokenizer

    @functools.cached_property
    def _state(self) -> tuple[str, Rules, str]:
        return self.source, self.rules, json.dumps(self.tokenizer.to_dict())

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_job, self._state

    def name(self, number: int, texts: Sequence[Text]) -> str:
        """Return the name of a part's file, which depends on everything that determines its content."""
        about = [VERSION, dataclasses.astuple(self.rules), fingerprint(self.tokenizer)]
        content = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
        for text, *flags in texts:
            encoded = text.encode()
            content.update(b"%d %d %d %d\n" % (len(encoded), *flags))
            content.update(encoded)
        return f"{number:06}-{content.hexdigest()}.npz"


@functools.lru_cache(maxsize=1)
def _load_job(source: str, rules: Rules, tokenizer: str) -> Job:
    return Job(source, rules, tokenizer_from_dict(json.loads(tokenizer)))


class Part(NamedTuple):
    """The encoded texts of a part. Documents begin with the end-of-text id.

    Attributes:
        ids: token ids of all texts that were kept.
        lengths: number of ids of each of them.
        sizes: bytes of each of them, in UTF-8.
        starts: 1 if a text starts a document, 0 if it continues one.
        signatures: MinHash signatures, if near duplicates are removed; zeros for texts that are not whole documents.
        counts: documents that were left out, by reason.
    """

    ids: UInt[np.ndarray, " ids"]
    lengths: Int64[np.ndarray, " texts"]
    sizes: Int64[np.ndarray, " texts"]
    starts: Int64[np.ndarray, " texts"]
    signatures: UInt32[np.ndarray, "texts_or_0 entries"]
    counts: Int64[np.ndarray, " reasons"]


Made = tuple[Path, Part]  # a part's file, and the part without its ids


def make_part(job: Job, folder: Path, number: int, texts: Sequence[Text]) -> Made:
    """Encode texts into a file in a folder, unless it exists and is intact.

    InputError: the tokenizer cannot encode a text.
    """
    path = folder / job.name(number, texts)
    part = read_part(path)
    if part is None:
        part = encode_part(job, texts)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **part._asdict())
    return path, part._replace(ids=part.ids[:0])


def read_part(path: Path) -> Part | None:
    """Read a file of `make_part`; None: it does not exist or is damaged (CRC-32 mismatch)."""
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            return Part(**{name: file[name] for name in Part._fields})
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def encode_part(job: Job, texts: Sequence[Text]) -> Part:
    """Filter and encode texts; InputError: the tokenizer cannot encode one."""
    counts = dict.fromkeys(REASONS, 0)
    kept: list[Text] = []
    for text in texts:
        reason = job.rules.reason(text)
        if reason is not None:
            counts[reason] += 1
        if reason in (None, "unfiltered"):
            kept.append(text)
    ids = [encode_text(job, text.text, text.is_start) for text in kept]
    signatures = np.zeros((0 if job.rules.near_duplicates is None else len(kept), ENTRIES), np.uint32)
    for row, text in zip(signatures, kept, strict=False):
        if text.is_whole:
            row[:] = signature(text.text)
    return Part(
        np.concatenate([np.zeros(0, token_dtype(job.tokenizer.vocab_size)), *ids]),
        np.array(list(map(len, ids)), np.int64),
        np.array([len(text.text.encode()) for text in kept], np.int64),
        np.array([text.is_start for text in kept], np.int64),
        signatures,
        np.array(list(counts.values()), np.int64),
    )


def encode_text(job: Job, text: str, is_start: bool = True) -> UInt[np.ndarray, " ids"]:
    """Return the ids of a text, encoded piece by piece; at the start of a document, after `document_ids`."""
    dtype = token_dtype(job.tokenizer.vocab_size)
    ids = [np.array(job.tokenizer.document_ids if is_start else [], dtype)]
    tokenizer = job.tokenizer if is_start else job.tokenizer.continued()
    for piece in cut_pieces([text], PIECE):
        try:
            ids.append(np.array(tokenizer.encode(piece), dtype))
            tokenizer = job.tokenizer.continued()
        except InputError as error:
            raise InputError(f"source {job.source!r}: in {piece.strip()[:40]!r} …: {error}") from None
    return np.concatenate(ids)


# Several at a time


@contextmanager
def workers(
    job: Job, folder: Path, processes: int
) -> Iterator[tuple[Callable[[int, Sequence[Text]], "Future[Made]"], int]]:
    """Yield a function that makes a part in the background (`make_part`), and the number of parts at a time.

    A single process has several threads, which help with subword tokenizers. BrokenProcessPool: a process was killed.
    """
    pool: Executor
    if processes == 1:
        processes = min(_MOST_THREADS, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(processes)
    else:  # forking a process with threads, such as JAX's, may hang
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_follow_parent)
    try:
        yield lambda number, texts: pool.submit(make_part, job, folder, number, texts), processes
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent process, and exit when it exits, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_order(submitted: Iterable[tuple["Future[Made]", int]], ahead: int) -> Iterator[tuple[Made, int]]:
    """Yield the finished parts in order, with the numbers submitted with them; at most ``ahead`` parts wait."""
    waiting: deque[tuple[Future[Made], int]] = deque()
    for each in submitted:
        waiting.append(each)
        if len(waiting) > ahead:
            future, n = waiting.popleft()
            yield future.result(), n
    for future, n in waiting:
        yield future.result(), n
