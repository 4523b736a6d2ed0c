"""``tokens:`` sources: files of token ids, bare little-endian integers as nanoGPT writes them, described by JSON.

``FILE.bin`` holds only ids, uint16 if the vocabulary has at most 65,536 tokens, else uint32. ``FILE.bin.json`` holds
the tokenizer, the counts and the SHA-256 of the ids; without it, ids are read as uint16.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt

from slm_jax.data.file_sources import unreadable
from slm_jax.data.rows import OnRead, Pieces, Source, ignore_bytes
from slm_jax.errors import InputError
from slm_jax.files import read_json, replace_text, replacing, sha256, unwritable, user_path
from slm_jax.tokenizer import Tokenizer, fingerprint, tokenizer_from_dict

FORMAT, VERSION = "slm_jax token ids", 1
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
# Files of ids with a header, which would be read as tokens.
_NOT_HEADERLESS = {
    b"\x93NUMPY": "a NumPy .npy file; convert it: np.load(FILE).astype('<u2').tofile('ids.bin')",
    (20240520).to_bytes(4, "little"): "an llm.c file, which has a header of 1024 bytes; remove it: tail -c +1025 FILE",
}
_CHUNK = 1 << 22  # tokens checked at a time
_AGAIN = "write it again with slm-jax prepare"


class TokenSource(Source):
    """A file of token ids; its name is the path."""

    scheme, form, has_rows = "tokens", "tokens:FILE.bin", False

    def texts(self, column: str | None = None, on_read: OnRead = ignore_bytes) -> Iterator[Pieces]:
        raise InputError(f"source {self} holds token ids, expected text, such as text:GLOB")

    def vocab_size(self) -> int | None:
        file = json_path(user_path(self.name))
        return read_description(file)["vocab_size"] if file.is_file() else None


class TokenFile(NamedTuple):
    """An opened file: ids mapped into memory; the tokenizer and the SHA-256 of described ones, None for bare ids."""

    tokens: UInt[np.ndarray, " tokens"]
    tokenizer: Tokenizer | None
    sha256: str | None


def json_path(path: Path) -> Path:
    """Return the path of a token file's description: ``FILE.bin.json``."""
    return path.with_name(f"{path.name}.json")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of ids: uint16 if it is large enough, else uint32."""
    return _DTYPES["uint16" if vocab_size <= 2**16 else "uint32"]


def open_token_file(path: str | Path) -> TokenFile:
    """Map a file of ids, after checking it against its JSON file, if it has one (which reads the whole file once).

    Bare ids must still be compared with a vocabulary: `check_ids`. InputError: a file that is missing, empty,
    truncated, changed, or something else.
    """
    path = Path(path).expanduser()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise unreadable(path, error) from None
    if json_path(path).exists():
        return _open_described(path, size)
    for magic, what in _NOT_HEADERLESS.items():
        if start.startswith(magic):
            raise InputError(f"{path}: expected bare uint16 ids, found {what}")
    if size == 0 or size % 2:
        raise InputError(f"{path}: {size} bytes; expected uint16 ids, two bytes each (empty or truncated?)")
    return TokenFile(map_ids(path, _DTYPES["uint16"]), None, None)


def _open_described(path: Path, size: int) -> TokenFile:
    file = json_path(path)
    about = read_description(file)
    dtype = _DTYPES[about["dtype"]]
    if size != about["tokens"] * dtype.itemsize:
        raise InputError(f"{path}: {size} bytes, but {file.name} says {about['tokens']} ids of {dtype.name}; {_AGAIN}")
    if (digest := sha256(path)) != about["sha256"]:
        raise InputError(f"{path}: SHA-256 is {digest}, but {file.name} says {about['sha256']}; {_AGAIN}")
    try:
        tokenizer = tokenizer_from_dict(about["tokenizer"])
        if fingerprint(tokenizer) != about["tokenizer_sha256"] or tokenizer.vocab_size != about["vocab_size"]:
            raise InputError("not the one that tokenizer_sha256 and vocab_size describe")
    except InputError as error:
        raise InputError(f"{file}: tokenizer: {error}; {_AGAIN}") from None
    return TokenFile(map_ids(path, dtype), tokenizer, digest)


def read_description(file: Path) -> dict[str, Any]:
    """Read a description, ``FILE.bin.json``; InputError: it cannot be read or doesn't describe ids."""
    about = read_json(file, _AGAIN)
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{file}: does not describe token ids (format {FORMAT!r}, version {VERSION}); {_AGAIN}")
    kinds = {"dtype": str, "sha256": str, "tokenizer_sha256": str, "tokens": int, "vocab_size": int, "tokenizer": dict}
    for name, kind in kinds.items():
        if type(about.get(name)) is not kind:
            raise InputError(f"{file}: {name} is {about.get(name)!r:.60}; expected {kind.__name__}; {_AGAIN}")
    if about["dtype"] not in _DTYPES:
        raise InputError(f"{file}: dtype is {about['dtype']!r}; expected {' or '.join(_DTYPES)}; {_AGAIN}")
    return about


def map_ids(path: Path, dtype: np.dtype[Any]) -> UInt[np.ndarray, " tokens"]:
    """Map ids into memory, unchecked."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def check_ids(tokens: UInt[np.ndarray, " tokens"], vocab_size: int, path: str | Path) -> None:
    """Raise InputError if an id is not below ``vocab_size``: on the device it would silently become another one."""
    for begin in range(0, len(tokens), _CHUNK):
        chunk = tokens[begin : begin + _CHUNK]
        if int(chunk.max()) >= vocab_size:
            where = int(np.argmax(chunk >= vocab_size))
            what = f"token {begin + where} has id {chunk[where]}, but the vocabulary has {vocab_size} ids"
            raise InputError(f"{path}: {what}; use the tokenizer that the file was made with")


class TokenWriter:
    """Appends ids to a token file; made by `write_token_file`, whose caller counts all but the tokens."""

    def __init__(self, file: BinaryIO, vocab_size: int) -> None:
        self.tokens = self.documents = 0
        self.text_bytes = self.bytes_read = 0  # size of the documents in UTF-8, bytes read from the sources' files
        self.counts: dict[str, int] = {}  # documents that were left out, by reason
        self._digest = hashlib.sha256()
        self._file, self._dtype = file, token_dtype(vocab_size)

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids written."""
        return self._digest.hexdigest()

    def write(self, ids: Sequence[int] | UInt[np.ndarray, " ids"]) -> None:
        """Append ids, each below the vocabulary's size."""
        data = np.asarray(ids, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(ids)


@contextmanager
def write_token_file(path: Path, tokenizer: Tokenizer, source: str) -> Iterator[TokenWriter]:
    """Yield a writer of a token file that appears, with its JSON file, when the block ends without an error.

    Ids go to a partial file beside it, which is always removed. An existing file is replaced; of several writers the
    last one wins. A file that cannot be written, such as on a full disk, is an InputError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            with partial.open("wb") as file:
                writer = TokenWriter(file, tokenizer.vocab_size)
                yield writer
                file.flush()
                os.fsync(file.fileno())
            description = {
                "format": FORMAT,
                "version": VERSION,
                "source": source,
                "dtype": token_dtype(tokenizer.vocab_size).name,
                "tokens": writer.tokens,
                "documents": writer.documents,
                "counts": writer.counts,
                "sha256": writer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer_sha256": fingerprint(tokenizer),
                "tokenizer": tokenizer.to_dict(),
            }
            # The JSON file first: ids without one would be read as bare uint16. A mismatch is noticed by the SHA-256.
            replace_text(json_path(path), json.dumps(description, indent=2) + "\n")
    except (InputError, BrokenPipeError):  # from the block
        raise
    except OSError as error:
        raise unwritable(path, error) from None
