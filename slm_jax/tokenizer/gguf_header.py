"""The metadata of a GGUF file: everything in it is checked against the file's length before it is believed.

Source: ggml, `docs/gguf.md`.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.errors import InputError

MAGIC = b"GGUF"
_AGAIN = "download or export it again"
_VERSIONS = (2, 3)
_MAX_ELEMENTS = 1 << 22  # of an array; the largest vocabularies have 262 thousand tokens, and about as many merges
_MAX_TEXT = 1 << 26  # bytes
_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4"},
    **{6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_TEXT, _ARRAY = 8, 9


def is_gguf(file: Path) -> bool:
    """Return whether a path is a file that begins as GGUF does."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_metadata(file: Path) -> dict[str, Any]:
    """Read the metadata of a GGUF file: numbers, booleans, texts, arrays of numbers (NumPy), lists of texts.

    InputError: the file is damaged or of another version.
    """
    with open_header(file) as header:
        return header.metadata


@contextmanager
def open_header(file: Path) -> Iterator["Header"]:
    """Open a file and read its metadata; the position is then at the table of its tensors."""
    if not is_gguf(file):
        raise InputError(f"{file}: does not begin with GGUF; {_AGAIN}")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield Header(file, data)


class Header:
    """The part of a file before its tensors, read up to ``position``; nothing is taken from beyond the file's end.

    Attributes:
        n_tensors: number of entries in the table of tensors.
        metadata: all metadata.
    """

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.position = file, data, len(MAGIC)
        self.n_tensors, n_entries = _counts(self)
        self.metadata = _metadata(self, n_entries)

    def damaged(self, problem: str) -> InputError:
        """Return what to raise for a header that contradicts itself or the file's length."""
        return InputError(f"{self.file}: a damaged GGUF file: {problem}; {_AGAIN}")

    def take(self, n_bytes: int, what: str) -> bytes:
        """Return the next bytes."""
        self.check_room(n_bytes, what)
        self.position += n_bytes
        return self.data[self.position - n_bytes : self.position]

    def check_room(self, n_bytes: int, what: str) -> None:
        """Refuse something that is longer than the rest of the file."""
        left = len(self.data) - self.position
        if n_bytes > left:
            raise self.damaged(f"{what} takes {n_bytes:,} bytes at {self.position:,}, where {left:,} are left")

    def number(self, dtype: str, what: str) -> Any:
        """Return the next number."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0].item()

    def text(self, what: str, errors: str = "strict") -> str:
        """Return the next text."""
        length = self.number("<u8", what)
        if length > _MAX_TEXT:
            raise self.damaged(f"{what} has {length:,} bytes; expected at most {_MAX_TEXT:,}")
        try:
            return self.take(length, what).decode(errors=errors)
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None


def _counts(header: Header) -> tuple[int, int]:
    """Return the numbers of tensors and of metadata entries."""
    version = header.number("<u4", "the version")
    if version not in _VERSIONS:
        raise InputError(f"{header.file}: GGUF version {version}; expected 2 or 3, little-endian")
    n_tensors, n_entries = header.number("<u8", "the header"), header.number("<u8", "the header")
    # An entry has at least a length, a type and a byte; a tensor a length, one dimension, a type and an offset.
    header.check_room(13 * n_entries, f"metadata of {n_entries:,} entries")
    header.check_room(32 * n_tensors, f"a table of {n_tensors:,} tensors")
    return n_tensors, n_entries


def _metadata(header: Header, n_entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(n_entries):
        key = header.text("a metadata key")
        what = f"metadata {key[:60]!r}"
        if key in metadata:
            raise header.damaged(f"{what} is there twice")
        kind = header.number("<u4", what)
        if kind == _ARRAY:
            metadata[key] = _array(header, what)
        elif kind == _TEXT:
            metadata[key] = header.text(what, "replace")
        elif kind in _SCALARS:
            metadata[key] = _plain(header.take(np.dtype(_SCALARS[kind]).itemsize, what), _SCALARS[kind])
        else:
            raise header.damaged(f"{what} has the unknown type {kind}")
    return metadata


def _plain(data: bytes, dtype: str) -> Any:
    """Return a number; a float32 as the shortest decimal that means it, 1e-05 instead of 9.999999747378752e-06."""
    value = np.frombuffer(data, dtype)[0]
    return float(str(value)) if dtype == "<f4" else value.item()


def _array(header: Header, what: str) -> Any:
    kind, length = header.number("<u4", what), header.number("<u8", what)
    if length > _MAX_ELEMENTS:
        raise header.damaged(f"{what} has {length:,} elements; expected at most {_MAX_ELEMENTS:,}")
    if kind == _TEXT:
        header.check_room(8 * length, what)
        return [header.text(what, "replace") for _ in range(length)]
    if kind not in _SCALARS:
        raise header.damaged(f"{what} is an array of the type {kind}, which is not supported")
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(header.take(length * dtype.itemsize, what), dtype)
