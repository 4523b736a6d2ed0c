"""Files of token ids: bare little-endian integers, as nanoGPT writes them, with a JSON file beside them that says
what they are.

``FILE.bin`` holds nothing but ids, uint16 where the vocabulary has at most 65,536 tokens and uint32 where it has more.
``FILE.bin.json`` holds the tokenizer, the counts and the SHA-256 of the ids; without it, ids are taken for uint16.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt

from slm_jax.data.text_files import unreadable
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import partial_path, read_json, replace_text, sha256, unwritable
from slm_jax.tokenizer import Tokenizer, fingerprint, tokenizer_from_dict

FORMAT, VERSION = "slm_jax token ids", 1
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_FIELDS = {
    **{"format": str, "version": int, "dtype": str, "tokens": int, "documents": int, "vocab_size": int},
    **{"tokenizer": dict, "tokenizer_sha256": str, "sha256": str, "source": str, "counts": dict},
}
# Files of ids that have a header; read as bare ids, it would pass for tokens.
_NOT_HEADERLESS = {
    b"\x93NUMPY": "a NumPy .npy file; write the bare ids: np.load(FILE).astype('<u2').tofile('ids.bin')",
    (20240520).to_bytes(4, "little"): "an llm.c file, which has a header of 1024 bytes; cut it off: tail -c +1025 FILE",
}
_CHUNK = 1 << 22  # tokens checked at a time
_AGAIN = "write it again with slm-jax prepare"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """An opened file of ids.

    Attributes:
        tokens: 1-D, mapped into memory, read-only.
        tokenizer: the one that made them; None for bare ids.
        sha256: of the file's bytes; None for bare ids.
    """

    tokens: UInt[np.ndarray, " tokens"]
    tokenizer: Tokenizer | None
    sha256: str | None


def json_path(path: Path) -> Path:
    """Return where the description of a token file lies: ``FILE.bin.json``."""
    return path.with_name(f"{path.name}.json")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest type that ids are kept in."""
    return _DTYPES["uint16" if vocab_size <= 2**16 else "uint32"]


def open_token_file(path: str | Path) -> TokenFile:
    """Map a file of ids, after it was read once and compared with its JSON file, if it has one.

    Args:
        path: ``FILE.bin``; ``~`` is expanded.

    Raises:
        MissingInputError: no such file.
        InputError: a file that is empty, cut short, changed, or something else; a JSON file that cannot be read or
            describes other ids. Bare ids must still be compared with a vocabulary: `check_ids`.
    """
    path = Path(path).expanduser()
    described = json_path(path).exists()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        if described and isinstance(error, FileNotFoundError):
            raise MissingInputError(
                f"{path}: no such file, though {json_path(path).name} is there: it was not finished, or one of the two "
                f"was moved alone; {_AGAIN}"
            ) from None
        if isinstance(error, FileNotFoundError):
            raise MissingInputError(
                f"{path}: no such file (looked from {Path.cwd()}); make it with slm-jax prepare --source TEXT --out "
                f"{path}, or check the path"
            ) from None
        raise unreadable(path, error) from None
    if described:
        return _open_described(path, size)
    if size == 0:
        raise InputError(f"{path}: the token file is empty; expected uint16 ids, two bytes each")
    for magic, what in _NOT_HEADERLESS.items():
        if start.startswith(magic):
            raise InputError(f"{path}: expected bare uint16 ids, found {what}")
    if size % 2:
        raise InputError(
            f"{path}: {size} bytes, an odd number; expected uint16 ids, two bytes each: "
            "the file was cut short or holds something else; write it again"
        )
    return TokenFile(map_ids(path, _DTYPES["uint16"]), None, None)


def check_ids(tokens: UInt[np.ndarray, " tokens"], vocab_size: int, path: str | Path) -> None:
    """Compare every id with the vocabulary: about a second a billion ids when the file is in memory.

    On the device an id out of range would silently become another one.

    Raises:
        InputError: an id is not below ``vocab_size``; names the first one, and ``path``.
    """
    for begin in range(0, len(tokens), _CHUNK):
        chunk = tokens[begin : begin + _CHUNK]
        if int(chunk.max()) >= vocab_size:
            where = int(np.argmax(chunk >= vocab_size))
            raise InputError(
                f"{path}: token {begin + where} has id {chunk[where]}, but the vocabulary has {vocab_size} "
                f"(ids 0 to {vocab_size - 1}); use the tokenizer that the file was made with, or encode the text again"
            )


class TokenWriter:
    """Appends ids to a token file; given by `write_token_file`.

    Attributes:
        tokens: how many were written.
        documents: how many the caller says they are.
        counts: of what was left out, by reason.
        sha256: of what was written; empty before all is.
    """

    def __init__(self, file: BinaryIO, vocab_size: int) -> None:
        self.tokens = 0
        self.documents = 0
        self.counts: dict[str, int] = {}
        self.sha256 = ""
        self._file = file
        self._dtype = token_dtype(vocab_size)
        self._digest = hashlib.sha256()

    def write(self, ids: Sequence[int] | UInt[np.ndarray, " ids"]) -> None:
        """Append ids that are below the vocabulary's size."""
        data = np.asarray(ids, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(ids)

    def finish(self) -> None:
        """Flush to the disk and set ``sha256``."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.sha256 = self._digest.hexdigest()


@contextmanager
def write_token_file(path: Path, tokenizer: Tokenizer, source: str) -> Iterator[TokenWriter]:
    """Give a writer of a token file that appears, whole and with its JSON file, when the block ends without an error.

    Ids go to a partial file beside it, which disappears whatever happens. A file that is there is replaced; of several
    writers at once the last one to end has it.

    Args:
        path: ``FILE.bin``; its folder is made.
        tokenizer: what the ids mean.
        source: where the text came from.

    Raises:
        InputError: whatever keeps the file from being written, such as a full disk.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            writer = TokenWriter(file, tokenizer.vocab_size)
            yield writer
            writer.finish()
        with _alone_in(path.parent):
            # The JSON file first: ids without one would pass for bare uint16.
            replace_text(json_path(path), json.dumps(_description(writer, tokenizer, source), indent=2) + "\n")
            partial.replace(path)
    except (InputError, BrokenPipeError):  # of what is done in the block
        raise
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for other writers, so that no file ends up beside another one's JSON; where the system has such locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _description(writer: TokenWriter, tokenizer: Tokenizer, source: str) -> dict[str, Any]:
    return {
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


def _open_described(path: Path, size: int) -> TokenFile:
    file = json_path(path)
    about = read_description(file)
    dtype = _DTYPES[about["dtype"]]
    expected = about["tokens"] * dtype.itemsize
    if size != expected:
        raise InputError(
            f"{path}: {size} bytes, but {file.name} says {about['tokens']} ids of {dtype.itemsize} bytes ({expected}): "
            f"the file was cut short or replaced; {_AGAIN}, or delete {file.name} if these are bare uint16 ids"
        )
    digest = sha256(path)
    if digest != about["sha256"]:
        raise InputError(
            f"{path}: its SHA-256 is {digest}, but {file.name} says {about['sha256']}: the file was changed or "
            f"damaged; {_AGAIN}"
        )
    return TokenFile(map_ids(path, dtype), _described_tokenizer(file, about), digest)


def map_ids(path: Path, dtype: np.dtype[Any]) -> UInt[np.ndarray, " tokens"]:
    """Map ids into memory, unchecked."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def read_description(file: Path) -> dict[str, Any]:
    """Read and check a description, ``FILE.bin.json``.

    Raises:
        InputError: it cannot be read, or describes no ids.
    """
    about = read_json(file, _AGAIN)
    if about.get("format") != FORMAT:
        raise InputError(
            f"{file}: does not describe token ids (no format {FORMAT!r}); {_AGAIN}, or move it away if "
            f"{file.stem} holds bare uint16 ids"
        )
    if about.get("version") != VERSION:
        raise InputError(f"{file}: version is {about.get('version')!r}; expected {VERSION}; {_AGAIN}")
    for name, kind in _FIELDS.items():
        if not isinstance(about.get(name), kind) or about[name] is True:
            raise InputError(f"{file}: {name} is {about.get(name)!r:.60}; expected {kind.__name__}; {_AGAIN}")
    if about["dtype"] not in _DTYPES:
        raise InputError(f"{file}: dtype is {about['dtype']!r}; expected {' or '.join(_DTYPES)}; {_AGAIN}")
    for name, n in {**about["counts"], "tokens": about["tokens"], "documents": about["documents"]}.items():
        if type(n) is not int or n < 0:
            raise InputError(f"{file}: {name} is {n!r:.60}; expected a whole number, at least 0; {_AGAIN}")
    return about


def _described_tokenizer(file: Path, about: Mapping[str, Any]) -> Tokenizer:
    try:
        tokenizer = tokenizer_from_dict(about["tokenizer"])
        found = {"tokenizer_sha256": fingerprint(tokenizer), "vocab_size": tokenizer.vocab_size}
    except InputError as error:
        raise InputError(f"{file}: tokenizer: {error}; {_AGAIN}") from None
    for name, value in found.items():
        if value != about[name]:
            raise InputError(
                f"{file}: {name} is {about[name]!r}, but the tokenizer in the same file has {value!r}: "
                f"the file was changed; {_AGAIN}"
            )
    return tokenizer
