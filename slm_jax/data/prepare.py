"""From sources of text to a token file, in memory that does not grow with the text.

The text is cut into parts of about four million characters. They are filtered and encoded in parallel into files of a
work folder; the ids are the same as for whole documents. Once all parts are complete, near duplicates are found, and
the rest is copied into the token file. After a kill, the next run finds the finished parts by their names, which depend
on everything that determines their content. Neither a resume nor the number of processes changes the token file.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
from jaxtyping import Bool

from slm_jax.data.filters import (
    DEFAULT_RULES,
    PIECE,
    REASONS,
    NormalForm,
    Rules,
    Text,
    mark_copies,
    normalized,
    nothing_left,
)
from slm_jax.data.near_duplicates import find_near_duplicates
from slm_jax.data.parts import Job, Part, in_order, read_part, workers
from slm_jax.data.rows import Source
from slm_jax.data.token_file import remove_partial, write_token_file
from slm_jax.errors import InputError
from slm_jax.files import unwritable
from slm_jax.tokenizer import BPETokenizer, Tokenizer, cut_pieces

TRAINING_CHARACTERS = 100_000_000  # characters that a tokenizer is trained on, at most
PART = 1 << 22  # characters


@dataclasses.dataclass
class Prepared:
    """Counts: documents, ids, bytes of text in UTF-8, bytes read from files, and documents left out by reason."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    bytes_read: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    sha256: str = ""  # SHA-256 of the ids, or of their shards (`slm_jax.data.token_file`)

    def add(self, part: Part) -> None:
        """Count a part."""
        n_documents = int(part.starts.sum())
        self.tokens += int(part.lengths.sum()) - (n_documents > 0 and not self.documents)  # none before the first
        self.documents += n_documents
        self.text_bytes += int(part.sizes.sum())
        for reason, n in zip(REASONS, part.counts.tolist(), strict=True):
            self.counts[reason] += n

    def remove(self, part: Part, kept: Bool[np.ndarray, " texts"]) -> None:
        """Subtract the near duplicates of a part, the texts that are not kept."""
        n_removed = int(np.count_nonzero(~kept))
        self.documents -= n_removed
        self.text_bytes -= int(part.sizes[~kept].sum())
        self.counts["near_duplicates"] += n_removed


def prepare(
    sources: Sequence[Source],
    out: Path,
    tokenizer: Tokenizer,
    *,
    text_column: str | None = None,
    rules: Rules = DEFAULT_RULES,
    shard_tokens: int | None = None,
    processes: int = 1,
    report: Callable[[Prepared], None] = lambda _: None,
) -> Prepared:
    """Encode sources, one after the other, into a token file (`slm_jax.data.token_file`); return its counts.

    ``shard_tokens`` is the number of ids per shard (None: one file). ``report`` is called regularly with the counts so
    far. If the process is killed or interrupted, the next call reuses the finished parts in the folder ``OUT.parts``;
    the result is the same.

    Raises:
        InputError: a source cannot be read, or the rules keep none of its text; the tokenizer cannot encode a text; a
            file cannot be written; another process is writing ``out``. Nothing is left behind.
    """
    tokenizer.encode("")  # raises if the tokenizer's files are missing, before anything is read
    job = Job(" ".join(map(str, sources)), rules, tokenizer)
    read, result = [0], Prepared()

    def count_empty() -> None:
        result.counts["empty"] += 1

    # A list, so that missing files are reported at once.
    found = itertools.chain.from_iterable([each.documents(text_column, read.append, count_empty) for each in sources])
    with _locked_folder(out) as folder:
        paths, parts = [], []
        with workers(job, folder, processes) as (make, n_workers):
            texts = enumerate(_cut(mark_copies(found, rules)))
            submitted = ((make(i, part), _take_sum(read)) for i, part in texts)
            for (path, part), bytes_read in in_order(submitted, ahead=n_workers + 1):
                paths.append(path)
                parts.append(part)
                result.add(part)
                result.bytes_read += bytes_read
                report(result)
        if not result.documents:
            raise nothing_left(job.source, result.counts)
        with write_token_file(out, tokenizer, job.source, shard_tokens) as file:
            for path, part, kept in zip(paths, parts, _find_kept(parts, rules.near_duplicates), strict=True):
                ids = _read_ids(path)
                if not kept.all():
                    result.remove(part, kept)
                    ids = ids[np.repeat(kept, part.lengths)]
                file.write(ids if file.tokens else ids[1:])  # the end-of-text id is between documents
            file.documents, file.counts = result.documents, result.counts
        return dataclasses.replace(result, tokens=file.tokens, sha256=file.sha256)


def work_folder(out: Path) -> Path:
    """Return the folder with the finished parts of an incomplete token file."""
    return out.with_name(f"{out.name}.parts")


@contextmanager
def _locked_folder(out: Path) -> Iterator[Path]:
    """Yield a locked folder; it is removed at the end, but kept with its parts after an interrupt."""
    folder, keep = work_folder(out), False
    lock = filelock.FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        remove_partial(out)
    except filelock.Timeout:
        raise InputError(f"{folder}: another process is preparing {out.name}; wait for it, or stop it") from None
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        yield folder
    except BrokenProcessPool:
        keep = True
        remedy = "run again with fewer processes, and it resumes"
        raise InputError(f"{out}: a process was killed, perhaps out of memory; {remedy}") from None
    except KeyboardInterrupt:
        keep = any(folder.glob("*.npz"))
        raise
    except InputError:  # a MissingInputError is also an OSError
        raise
    except OSError as error:
        keep = True
        raise unwritable(folder, error) from None
    finally:
        lock.release()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _cut(texts: Iterable[Text]) -> Iterator[list[Text]]:
    part: list[Text] = []
    n_characters = 0
    for text in texts:
        part.append(text)
        n_characters += len(text.text)
        if n_characters >= PART:
            yield part
            part, n_characters = [], 0
    if part:
        yield part


def _take_sum(numbers: list[int]) -> int:
    total = sum(numbers)
    numbers.clear()
    return total


def _read_ids(path: Path) -> np.ndarray:
    if (part := read_part(path)) is None:
        raise InputError(f"{path}: was changed or removed by another program; run again")
    return part.ids


def _find_kept(parts: Sequence[Part], threshold: float | None) -> list[Bool[np.ndarray, " texts"]]:
    """Return for each part which of its texts are not near duplicates."""
    kept = np.ones(sum(len(part.lengths) for part in parts), bool)
    if threshold is not None:
        signatures = np.concatenate([part.signatures for part in parts])
        compared = signatures.any(axis=1)  # pieces of long documents have none
        kept[compared] = ~find_near_duplicates(signatures[compared], threshold)
    return np.split(kept, np.cumsum([len(part.lengths) for part in parts])[:-1])


def train_tokenizer(
    sources: Sequence[Source],
    vocab_size: int,
    text_column: str | None = None,
    normalize: NormalForm | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> BPETokenizer:
    """Train a byte-level BPE on the first 100 million characters; ``report`` gets the number of characters read."""

    def first() -> Iterator[str]:
        n_read = 0
        for document in itertools.chain.from_iterable([source.documents(text_column) for source in sources]):
            for piece in cut_pieces(document, PIECE):
                yield normalized(piece, normalize)
                n_read += len(piece)
                report(n_read)
                if n_read >= TRAINING_CHARACTERS:
                    return

    return BPETokenizer.train(first(), vocab_size)
