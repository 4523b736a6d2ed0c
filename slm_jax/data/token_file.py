"""``tokens:`` sources: files of token ids, raw little-endian integers as in nanoGPT, with a JSON description.

``FILE.bin`` has only ids, uint16 if the vocabulary has at most 65,536 tokens, else uint32. ``FILE.bin.json`` has the
tokenizer, the counts and the SHA-256 of the ids; without it, ids are read as uint16, or according to llm.c's header.

The ids may be split over shards, ``FILE-00000.bin``, ``FILE-00001.bin``, … ``FILE.bin.json`` lists them with their
sizes and SHA-256. ``FILE.bin`` then does not exist, but ``tokens:FILE.bin`` names the shards. All files may be in
object storage (``tokens:gs://bucket/FILE.bin``).
"""

import codecs
import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
from jaxtyping import UInt
from msgspec import Meta

from slm_jax.data import remote
from slm_jax.data.file_sources import kind_of, unreadable
from slm_jax.data.ids import Ids, ShardedIds
from slm_jax.data.rows import OnRead, Pieces, Source, ignore_bytes
from slm_jax.errors import InputError
from slm_jax.files import (
    check_kind,
    is_url,
    parse_json,
    read_json,
    replace_text,
    replacing,
    sha256,
    unwritable,
    user_path,
)
from slm_jax.tokenizer import Tokenizer, fingerprint, tokenizer_from_dict

FORMAT, VERSION = "slm_jax token ids", 1
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_NUMPY = b"\x93NUMPY"
# llm.c's files: version and dtype by magic number. Source: karpathy/llm.c, dev/data/data_common.py.
_LLMC = {
    20240520: (1, _DTYPES["uint16"]),
    20240801: (7, _DTYPES["uint32"]),
    20251013: (1, _DTYPES["uint32"]),
}
_LLMC_HEADER_BYTES = 1024
_CHUNK = 1 << 22  # tokens checked at a time
# To recognise other data in a bare file by its start, if it is long enough. No vocabulary has 2**20 ids.
_SAMPLE_BYTES, _LEAST_BYTES, _MOST_UPPER = 1 << 16, 128, 16
_NOT_IN_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_AGAIN = "write it again with slm-jax prepare"


class _ListedShard(TypedDict):
    tokens: Annotated[int, Meta(ge=0)]
    sha256: str


class _Description(TypedDict):
    dtype: Literal["uint16", "uint32"]
    tokens: Annotated[int, Meta(ge=0)]
    sha256: str
    shards: NotRequired[Annotated[list[_ListedShard], Meta(min_length=1)]]
    vocab_size: int
    tokenizer_sha256: str
    tokenizer: dict[str, Any]


class TokenSource(Source):
    """A file of token ids; its name is the path."""

    scheme, form, has_rows = "tokens", "tokens:FILE.bin", False

    def texts(self, column: str | None = None, on_read: OnRead = ignore_bytes) -> Iterator[Pieces]:
        raise InputError(f"source {self} holds token ids, expected text, such as text:GLOB")

    def vocab_size(self) -> int | None:
        if is_url(self.name):
            about = remote.read_description(self.name)
            return None if about is None else _parse(about, self.name)["vocab_size"]
        file = json_path(user_path(self.name))
        return read_description(file)["vocab_size"] if file.is_file() else None


class TokenFile(NamedTuple):
    """An opened file: ids mapped into memory; the tokenizer and the SHA-256 of described ones, None for bare ids."""

    tokens: Ids
    tokenizer: Tokenizer | None
    sha256: str | None


def json_path(path: Path) -> Path:
    """Return the path of a token file's description: ``FILE.bin.json``."""
    return path.with_name(f"{path.name}.json")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of ids: uint16 if it is large enough, else uint32."""
    return _DTYPES["uint16" if vocab_size <= 2**16 else "uint32"]


def shard_path(path: Path, number: int) -> Path:
    """Return the path of a shard: ``FILE-00000.bin`` for the first one of ``FILE.bin``."""
    return path.with_name(f"{path.stem}-{number:05}{path.suffix}")


def open_token_file(path: str | Path, verify: bool = True) -> TokenFile:
    """Map a file of ids, or its shards, after checking it against its JSON file, if it has one.

    ``verify`` also compares the SHA-256, which reads all ids once. The range of bare ids is not checked: use
    `check_ids`. A file in object storage is first copied into the user's cache, once. InputError: a file that is
    missing, empty, truncated, changed, or has other content.
    """
    if isinstance(path, str) and is_url(path):
        path = remote.local_copy(path, functools.partial(_remote_files, path), open_token_file)
    path = Path(path).expanduser()
    if json_path(path).exists():
        return _open_described(path, verify)
    size = _size(path)
    with path.open("rb") as file:
        start = file.read(_SAMPLE_BYTES)
    if start.startswith(_NUMPY):
        problem = "a NumPy .npy file; convert it: np.load(FILE).astype('<u2').tofile('ids.bin')"
        raise InputError(f"{path}: expected bare uint16 ids, found {problem}")
    if int.from_bytes(start[:4], "little") in _LLMC:
        return TokenFile(_llmc_ids(path, start, size), None, None)
    if size == 0 or size % 2:
        raise InputError(f"{path}: {size} bytes; expected uint16 ids, two bytes each (empty or truncated?)")
    if kind := _other_kind(start, size):
        raise InputError(f"{path}: expected bare uint16 ids, found {kind}")
    return TokenFile(map_ids(path, _DTYPES["uint16"]), None, None)


def _other_kind(start: bytes, size: int) -> str | None:
    """Return what a file without a description seems to contain instead of uint16 ids; None: it may be ids."""
    if kind := kind_of(start):
        return kind
    if len(start) < _LEAST_BYTES:
        return None
    parts = np.frombuffer(start[: len(start) // 8 * 8], "<u2").reshape(-1, 4)
    convert = "convert it: np.fromfile(FILE, '<{}').astype('<u2').tofile('ids.bin')"
    if size % 8 == 0 and parts[:, 0].any() and not parts[:, 2:].any() and parts[:, 1].max() < _MOST_UPPER:
        return f"what looks like int64 ids; {convert.format('i8')}"
    # The upper halves of 32-bit ids are small, the lower halves are not.
    upper, lower = parts[:, 1::2].max(), parts[:, ::2].max()
    if size % 4 == 0 and upper < _MOST_UPPER and lower > (255 if upper else 0):
        return f"what looks like uint32 ids; {convert.format('u4')}"
    with suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # its last character may be cut
        if not _NOT_IN_TEXT.search(text):
            return f"text ({text[:20]!r}); use text:FILE, or slm-jax prepare --source text:FILE"
    return None


def _llmc_ids(path: Path, start: bytes, size: int) -> UInt[np.ndarray, " tokens"]:
    """Map the ids of an llm.c file, which follow a header with its version and the number of ids."""
    magic, version, n_tokens = (int.from_bytes(start[i : i + 4], "little") for i in (0, 4, 8))
    expected, dtype = _LLMC[magic]
    if version != expected:
        raise InputError(f"{path}: an llm.c file of version {version}; expected version {expected}")
    if size != _LLMC_HEADER_BYTES + n_tokens * dtype.itemsize or not n_tokens:
        what = f"{size} bytes, but its llm.c header says {n_tokens} ids of {dtype.name}"
        raise InputError(f"{path}: {what}; download it again")
    return np.memmap(path, dtype, "r", _LLMC_HEADER_BYTES)


def _size(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unreadable(path, error) from None


def _open_described(path: Path, verify: bool) -> TokenFile:
    file = json_path(path)
    about = read_description(file)
    dtype = _DTYPES[about["dtype"]]
    parts = token_paths(path, about)
    for part, listed in parts.items():
        size, digest = _size(part), listed["sha256"]
        if size != listed["tokens"] * dtype.itemsize:
            what = f"{size} bytes, but {file.name} says {listed['tokens']} ids of {dtype.name}"
            raise InputError(f"{part}: {what}; {_AGAIN}")
        if verify and (found := sha256(part)) != digest:
            raise InputError(f"{part}: SHA-256 is {found}, but {file.name} says {digest}; {_AGAIN}")
    try:
        tokenizer = tokenizer_from_dict(about["tokenizer"])
        if fingerprint(tokenizer) != about["tokenizer_sha256"] or tokenizer.vocab_size != about["vocab_size"]:
            raise InputError("not the one that tokenizer_sha256 and vocab_size describe")
    except InputError as error:
        raise InputError(f"{file}: tokenizer: {error}; {_AGAIN}") from None
    arrays = [map_ids(part, dtype) for part in parts]
    return TokenFile(arrays[0] if len(arrays) == 1 else ShardedIds(arrays), tokenizer, about["sha256"])


def token_paths(path: Path, about: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """Return the files of ids that a description lists, in order, with their ``tokens`` and ``sha256``."""
    if "shards" not in about:
        return {path: {"tokens": about["tokens"], "sha256": about["sha256"]}}
    return {shard_path(path, i): shard for i, shard in enumerate(about["shards"])}


def _remote_files(url: str, about: bytes) -> dict[str, int]:
    """Return the names and sizes in bytes of the files of ids that a description in object storage lists."""
    description = _parse(about, url)
    each = _DTYPES[description["dtype"]].itemsize
    parts = token_paths(Path(url.rpartition("/")[2]), description)
    return {part.name: listed["tokens"] * each for part, listed in parts.items()}


def read_description(file: Path) -> dict[str, Any]:
    """Read a description, ``FILE.bin.json``; InputError: it cannot be read or doesn't describe ids."""
    return _check_description(read_json(file, _AGAIN), str(file))


def _parse(about: bytes, url: str) -> dict[str, Any]:
    return _check_description(parse_json(about, f"{url}.json", _AGAIN), f"{url}.json")


def _check_description(about: dict[str, Any], file: str) -> dict[str, Any]:
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{file}: does not describe token ids (format {FORMAT!r}, version {VERSION}); {_AGAIN}")
    check_kind(about, _Description, file, _AGAIN)
    if "shards" in about and sum(shard["tokens"] for shard in about["shards"]) != about["tokens"]:
        raise InputError(f"{file}: shards don't have {about['tokens']} tokens together; {_AGAIN}")
    return about


def map_ids(path: Path, dtype: np.dtype[Any]) -> UInt[np.ndarray, " tokens"]:
    """Map ids into memory, unchecked."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def check_ids(tokens: Ids, vocab_size: int, path: str | Path) -> None:
    """Raise InputError if an id is not below ``vocab_size``; on the device it would silently become another id."""
    for begin in range(0, len(tokens), _CHUNK):
        chunk = tokens[begin : begin + _CHUNK]
        if int(chunk.max()) >= vocab_size:
            where = int(np.argmax(chunk >= vocab_size))
            what = f"token {begin + where} has id {chunk[where]}, but the vocabulary has {vocab_size} ids"
            raise InputError(f"{path}: {what}; use the tokenizer that the file was made with")


class TokenWriter:
    """Appends ids to a token file or its shards; created by `write_token_file`, whose caller sets the counts."""

    def __init__(self, files: ExitStack, path: Path, vocab_size: int, shard_tokens: int | None) -> None:
        self.tokens = self.documents = 0
        self.counts: dict[str, int] = {}  # documents that were left out, by reason
        self._files, self._path, self._dtype, self._shard_tokens = files, path, token_dtype(vocab_size), shard_tokens
        self._shards: list[_Shard] = []
        self._start_shard()

    def write(self, ids: Sequence[int] | UInt[np.ndarray, " ids"]) -> None:
        """Append ids, each below the vocabulary's size."""
        rest = np.asarray(ids, dtype=self._dtype)
        self.tokens += len(rest)
        while len(rest):
            if self._shards[-1].tokens == self._shard_tokens:
                self._shards[-1].close()
                self._start_shard()
            n = len(rest) if self._shard_tokens is None else self._shard_tokens - self._shards[-1].tokens
            self._shards[-1].write(rest[:n])
            rest = rest[n:]

    def close(self) -> dict[str, Any]:
        """Flush the last file to the disk; return the description of the ids."""
        self._shards[-1].close()
        about = {"dtype": self._dtype.name, "tokens": self.tokens, "documents": self.documents, "counts": self.counts}
        if self._shard_tokens is None:
            return about | {"sha256": self.sha256}
        shards = [{"tokens": shard.tokens, "sha256": shard.digest.hexdigest()} for shard in self._shards]
        return about | {"sha256": self.sha256, "shards": shards}

    @property
    def paths(self) -> list[Path]:
        """The files with the ids."""
        if self._shard_tokens is None:
            return [self._path]
        return [shard_path(self._path, i) for i in range(len(self._shards))]

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids written; of shards: `sha256_of_shards`."""
        digests = [shard.digest.hexdigest() for shard in self._shards]
        return digests[0] if self._shard_tokens is None else sha256_of_shards(digests)

    def _start_shard(self) -> None:
        self._shards.append(_Shard())
        partial = self._files.enter_context(replacing(self.paths[-1]))
        self._shards[-1].file = self._files.enter_context(partial.open("wb"))


class _Shard:
    file: BinaryIO

    def __init__(self) -> None:
        self.digest, self.tokens = hashlib.sha256(), 0

    def write(self, ids: UInt[np.ndarray, " ids"]) -> None:
        data = ids.tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(ids)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def sha256_of_shards(digests: Sequence[str]) -> str:
    """Return the SHA-256 of a list of shards: of their SHA-256, one per line."""
    return hashlib.sha256("".join(f"{each}\n" for each in digests).encode()).hexdigest()


@contextmanager
def write_token_file(
    path: Path, tokenizer: Tokenizer, source: str, shard_tokens: int | None = None
) -> Iterator[TokenWriter]:
    """Yield a writer; the token file and its JSON file appear when the block ends without an error.

    ``shard_tokens`` is the number of ids per shard (None: one file). Ids are written to partial files beside it, which
    are always removed. An existing file or its shards are replaced; of several writers, the last one wins. InputError:
    a file cannot be written, for example because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced = existing_paths(path)
        with ExitStack() as files:
            writer = TokenWriter(files, path, tokenizer.vocab_size, shard_tokens)
            yield writer
            # The JSON file first: ids without one would be read as uint16, while a mismatch is found by the SHA-256.
            replace_text(json_path(path), describe(tokenizer, source, writer.close()))
        for old in set(replaced) - {json_path(path), *writer.paths}:
            old.unlink()
    except (InputError, BrokenPipeError):  # from the block
        raise
    except OSError as error:
        raise unwritable(path, error) from None


def existing_paths(path: Path) -> list[Path]:
    """Return the existing files of a token file: ids, description, shards."""
    shards = path.parent.glob(f"{glob.escape(path.stem)}-{'[0-9]' * 5}{path.suffix}")
    return [found for found in (path, json_path(path), *sorted(shards)) if found.exists()]


def remove_partial(path: Path) -> None:
    """Remove partial files of a token file and its shards that a killed process left."""
    for shard in ("", f"-{'[0-9]' * 5}"):
        for old in path.parent.glob(f"{glob.escape(path.stem)}{shard}{path.suffix}.{'?' * 8}.partial"):
            old.unlink(missing_ok=True)


def describe(tokenizer: Tokenizer, source: str, ids: Mapping[str, Any]) -> str:
    """Return the content of ``FILE.bin.json``; ``ids`` has the fields about the ids and their shards."""
    description = {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        **ids,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": fingerprint(tokenizer),
        "tokenizer": tokenizer.to_dict(),
    }
    return json.dumps(description, indent=2) + "\n"
