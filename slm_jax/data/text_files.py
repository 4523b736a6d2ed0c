"""Text files in UTF-8, plain or compressed (``.gz``, ``.zst``), read in pieces."""

import codecs
import gzip
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from slm_jax.errors import InputError, MissingInputError

PIECE = 1 << 20  # bytes, before they are decoded


def untold(_: int) -> None:
    """Ignore how many bytes were read."""


def iter_text(path: Path, told: Callable[[int], None] = untold) -> Iterator[str]:
    """Yield the text of a file in pieces of at most a megabyte, without a byte order mark and with CR LF as LF.

    Args:
        path: a file; one that ends in ``.gz`` or ``.zst`` is decompressed.
        told: called with the number of bytes that were read of it since the last call.

    Raises:
        InputError: a file that cannot be read, is cut off or damaged, in another encoding, or binary.
    """
    held = ""  # a CR that an LF may follow
    for text in _decode(path, _chunks(path, told)):
        text = held + text
        held = "\r" if text.endswith("\r") else ""
        if piece := text.removesuffix("\r").replace("\r\n", "\n"):
            yield piece
    if held:
        yield held


def read_text(path: Path) -> str:
    """Return the whole text of a file; as `iter_text`."""
    return "".join(iter_text(path))


def unreadable(path: Path, error: OSError) -> InputError:
    """Return what to raise for a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return MissingInputError(f"{path}: no such file (looked from {Path.cwd()}); check the path")
    if isinstance(error, IsADirectoryError):
        return InputError(f"{path} is a folder, expected a file")
    return InputError(f"{path}: cannot be read: {error.strerror or error}; check what it is and its permissions")


def _chunks(path: Path, told: Callable[[int], None]) -> Iterator[bytes]:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error
    with raw:
        stream, at, size = _decompressed(path, raw), 0, 0
        while True:
            try:
                chunk: bytes = stream.read(PIECE)
                if stream is not raw and raw.tell() == 0:  # as a copy that broke off at once leaves it
                    raise EOFError("the file is empty")
            except (OSError, EOFError, zlib.error) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise unreadable(path, error) from error
                raise InputError(
                    f"{path}: the compressed file is cut off or damaged, after {size:,} bytes of text "
                    f"({' '.join(str(error).split())}); copy or download it again"
                ) from error
            told(raw.tell() - at)
            at, size = raw.tell(), size + len(chunk)
            if not chunk:
                return
            yield chunk


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return raw


def _decode(path: Path, chunks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_bytes = n_characters = n_lines = n_nuls = 0
    for chunk in itertools.chain(chunks, [b""]):  # at the last the decoder knows that nothing follows
        if not n_bytes and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(
                f"{path}: is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW.txt"
            )
        undecoded = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at = n_bytes - undecoded + error.start
            line = n_lines + error.object.count(b"\n", 0, error.start) + 1
            raise InputError(
                f"{path}: not UTF-8: byte {at} (line {line}) is 0x{error.object[error.start]:02x}; if the file is text "
                f"in another encoding, convert it, such as: iconv -f WINDOWS-1252 -t UTF-8 {path} > NEW.txt"
            ) from error
        if not n_characters:
            text = text.removeprefix("\ufeff")
        n_bytes, n_characters = n_bytes + len(chunk), n_characters + len(text)
        n_lines, n_nuls = n_lines + text.count("\n"), n_nuls + text.count("\0")
        if n_nuls * 100 > n_characters:
            raise InputError(
                f"{path}: {n_nuls} of {n_characters} characters are NUL: a binary file, expected text in UTF-8"
            )
        yield text
