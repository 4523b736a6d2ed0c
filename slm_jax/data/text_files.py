"""``text:`` sources: text files in UTF-8, plain or compressed (``.gz``, ``.zst``), read in pieces."""

import codecs
import glob
import gzip
import itertools
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from slm_jax.data.rows import OnRead, Pieces, Source, ignore_bytes
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import user_path

PIECE = 1 << 20  # bytes, before they are decoded


class TextFiles(Source):
    """Each file is one text."""

    scheme, form, has_rows = "text", "text:GLOB", False

    def files(self) -> list[Path]:
        """Return the files that match, sorted."""
        return matching_files(self.name)

    def texts(self, column: str | None = None, on_read: OnRead = ignore_bytes) -> Iterator[Pieces]:
        """Return the text of each file; ``column`` is ignored."""
        return (iter_text(path, on_read) for path in self.files())


def matching_files(pattern: str) -> list[Path]:
    """Return the files that a path or glob pattern matches, sorted; ``~`` and ``**`` work, folders are left out.

    Raises:
        InputError: a folder, or one on the path that cannot be read.
        MissingInputError: no file matches.
    """
    literal = user_path(pattern)
    try:
        if literal.is_dir():
            raise InputError(f"{literal} is a folder; expected files, such as {literal / '**' / '*.txt'}")
        if literal.exists():  # before globbing: a name may contain brackets
            return [literal]
    except OSError as error:  # a folder on the path that may not be entered, a name that is too long
        raise unreadable(literal, error) from error
    found = glob.glob(str(literal), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    files = [path for path in sorted(map(Path, found)) if not path.is_dir()]
    if not files:
        what = "no file matches; quote patterns" if glob.has_magic(pattern) else "no such file"
        raise MissingInputError(f"{literal}: {what} (current folder: {Path.cwd()})")
    return files


def iter_text(path: Path, on_read: OnRead = ignore_bytes) -> Iterator[str]:
    """Yield the text of a file in pieces of at most a megabyte, without a byte order mark and with CR LF as LF.

    Files that end in ``.gz`` or ``.zst`` are decompressed. ``on_read`` is called with the number of bytes of the file
    that were read since the last call.

    Raises:
        InputError: a file that cannot be read, is truncated, damaged, binary or not in UTF-8.
    """
    carry = ""  # a CR that an LF may follow
    for decoded in _decode(path, _chunks(path, on_read)):
        text = carry + decoded
        carry = "\r" if text.endswith("\r") else ""
        if piece := text.removesuffix("\r").replace("\r\n", "\n"):
            yield piece
    if carry:
        yield carry


def read_text(path: Path) -> str:
    """Return the whole text of a file; as `iter_text`."""
    return "".join(iter_text(path))


def unreadable(path: Path, error: OSError) -> InputError:
    """Return the error for a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return MissingInputError(f"{path}: no such file (current folder: {Path.cwd()})")
    return InputError(f"{path}: cannot be read: {error.strerror or error}")


def _chunks(path: Path, on_read: OnRead) -> Iterator[bytes]:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error
    with raw:
        stream, at, size = _decompressed(path, raw), 0, 0
        while True:
            try:
                chunk: bytes = stream.read(PIECE)
                if stream is not raw and raw.tell() == 0:  # a copy that was interrupted at once
                    raise EOFError("the file is empty")
            except (OSError, EOFError, zlib.error) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise unreadable(path, error) from error
                reason = " ".join(str(error).split())
                raise InputError(
                    f"{path}: the compressed file is truncated or damaged after {size:,} bytes of text ({reason})"
                ) from error
            on_read(raw.tell() - at)
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
    for chunk in itertools.chain(chunks, [b""]):  # the last one tells the decoder that nothing follows
        if not n_bytes and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{path}: is UTF-16, expected UTF-8; convert it with iconv -f UTF-16 -t UTF-8")
        undecoded = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at = n_bytes - undecoded + error.start
            line = n_lines + error.object.count(b"\n", 0, error.start) + 1
            raise InputError(
                f"{path}: not UTF-8: byte {at} (line {line}) is 0x{error.object[error.start]:02x}; convert it, such as "
                "with iconv -f WINDOWS-1252 -t UTF-8"
            ) from error
        if not n_characters:
            text = text.removeprefix("\ufeff")
        n_bytes, n_characters = n_bytes + len(chunk), n_characters + len(text)
        n_lines, n_nuls = n_lines + text.count("\n"), n_nuls + text.count("\0")
        if n_nuls * 100 > n_characters:
            raise InputError(f"{path}: {n_nuls} of {n_characters} characters are NUL; expected text, not a binary file")
        yield text
