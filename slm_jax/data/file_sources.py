"""Sources that are files: text (plain, ``.gz`` or ``.zst``, read in pieces), JSON, tables and Parquet."""

import codecs
import csv
import glob
import gzip
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from slm_jax.data.rows import OnRead, Pieces, Row, Source, ignore_bytes
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import parse_json, user_path

PIECE = 1 << 20  # bytes, before they are decoded
_OTHER_UTF = [  # longer marks first
    *((mark, "UTF-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "UTF-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
]
_KINDS = {
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive, such as a Word document (.docx) or an Excel table (.xlsx)",
    b"\xd0\xcf\x11\xe0": "an old Word or Excel document (.doc, .xls)",
    b"{\\rtf": "a rich text document (.rtf)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"\x89PNG": "a picture (PNG)",
    b"GIF8": "a picture (GIF)",
    b"\x1f\x8b\x08": "compressed by gzip (its name should end in .gz)",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard (its name should end in .zst)",
    b"PAR1": "Parquet (parquet:GLOB reads it)",
    b"GGUF": "a model in GGUF",
    b"SQLite format 3": "a database (SQLite)",
}
# A decompressed file may have this many bytes, or this many times its compressed size; text needs a tenth of that.
_FREE_BYTES, _MOST_TIMES = 1 << 26, 200
_PARQUET_ROWS = 64  # in memory at a time


class _Files(Source):
    """Files that match a pattern, in the order of their paths."""

    def files(self) -> list[Path]:
        """Return the matching files, sorted, without folders; ``~`` and ``**`` work. InputError: no file matches."""
        literal = user_path(self.name)
        try:
            if literal.is_dir():
                raise InputError(f"{literal} is a folder; expected files, such as {literal / '**' / '*.txt'}")
            if literal.exists():  # before globbing: a name may contain brackets
                return [literal]
        except OSError as error:  # no permission for a folder on the path, or a name that is too long
            raise unreadable(literal, error) from error
        found = glob.glob(str(literal), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        files = [path for path in sorted(map(Path, found)) if not path.is_dir()]
        if not files:
            what = "no file matches; quote patterns" if glob.has_magic(self.name) else "no such file"
            raise MissingInputError(f"{literal}: {what} (current folder: {Path.cwd()})")
        return files

    def rows(self, columns: Sequence[str] = (), on_read: OnRead = ignore_bytes) -> Iterator[Row]:
        return (row for path in self.files() for row in self._read(path, columns, on_read))

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> Iterable[Row]:
        raise NotImplementedError


class TextFiles(_Files):
    """Text files in UTF-8, each one text."""

    scheme, form, has_rows = "text", "text:GLOB", False
    rows = Source.rows  # refuses

    def texts(self, column: str | None = None, on_read: OnRead = ignore_bytes) -> Iterator[Pieces]:
        return (iter_text(path, on_read) for path in self.files())


class JsonLines(_Files):
    """One JSON object a line."""

    scheme, form = "jsonl", "jsonl:GLOB"

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> Iterator[Row]:
        for number, line in enumerate(_lines(iter_text(path, on_read)), start=1):
            if line.strip():
                yield _object(f"{path} line {number}", parse_json(line, f"{path} line {number}", kind=Any))


class Json(_Files):
    """One list of JSON objects."""

    scheme, form = "json", "json:GLOB"

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> Iterator[Row]:
        content = parse_json("".join(iter_text(path, on_read)), path, kind=Any)
        if not isinstance(content, list):
            raise InputError(f"{path}: {content!r:.60} is not a list; expected one list of JSON objects")
        return (_object(f"{path} entry {number}", value) for number, value in enumerate(content, start=1))


class Table(_Files):
    """A table with a header line, or without one if `header` names its columns; empty lines are skipped."""

    delimiter: ClassVar[str]

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> Iterator[Row]:
        lines = io.StringIO("".join(iter_text(path, on_read)), newline="")
        delimiter = self._find_delimiter(lines.readline())
        lines.seek(0)
        csv.field_size_limit(2**31 - 1)  # characters; by default a text of 131,073 is an error
        quoting: Any = csv.QUOTE_NONE if self.delimiter == "\t" else csv.QUOTE_MINIMAL
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        names = _distinct("columns", self.header)
        while True:
            where = f"{path} line {reader.line_num + 1}"  # its first line: quoted fields may contain line breaks
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(f"{where}: {error}; expected fields separated by {delimiter!r}") from None
            if values and not names:
                names = _distinct(where, values)
            elif values and len(values) != len(names):
                raise InputError(f"{where}: {len(values)} fields, expected {len(names)} ({', '.join(names):.200})")
            elif values:
                yield Row(where, dict(zip(names, values, strict=True)))

    def _find_delimiter(self, line: str) -> str:
        return self.delimiter


class Csv(Table):
    """Fields separated by commas, quoted as in RFC 4180; by semicolons or tabs if the first line has no comma."""

    scheme, form, delimiter = "csv", "csv:GLOB", ","

    def _find_delimiter(self, line: str) -> str:
        return next((each for each in (",", ";", "\t") if each in line), ",")


class Tsv(Table):
    """Fields separated by tabs; quotes are ordinary characters."""

    scheme, form, delimiter = "tsv", "tsv:GLOB", "\t"


class Parquet(_Files):
    """Apache Parquet; only the columns that are needed are read."""

    scheme, form = "parquet", "parquet:GLOB"

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        size, n_read, reported = path.stat().st_size, 0, 0
        try:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:  # else reads whole row groups
                known = file.schema_arrow.names
                names = list(columns) or known
                for name in names:
                    Row(str(path), dict.fromkeys(known)).field(name)
                _distinct(str(path), [name for name in known if name in names])
                for batch in file.iter_batches(_PARQUET_ROWS, columns=names):
                    # By name: a struct's field can have the same dotted path as a column.
                    values = [_as_python(batch.column(name)) for name in names]
                    for number, row in enumerate(zip(*values, strict=True), start=n_read + 1):
                        yield Row(f"{path} row {number}", dict(zip(names, row, strict=True)))
                    n_read += len(batch)
                    at = size * n_read // file.metadata.num_rows
                    on_read(at - reported)
                    reported = at
        except InputError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: cannot be read as Parquet after {n_read:,} rows ({reason:.200})") from error


def _distinct(where: str, names: Sequence[str]) -> Sequence[str]:
    if twice := [name for name, n in Counter(names).items() if name and n > 1]:
        raise InputError(f"{where}: column {twice[0]!r:.60} occurs twice; expected distinct names")
    return names


def _as_python(column: Any) -> list[Any]:
    import pyarrow as pa

    binary = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    values: list[Any] = (column.cast(pa.large_string()) if binary else column).to_pylist()
    return values


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    start: list[str] = []  # the beginning of a line that continues in the next piece
    for piece in pieces:
        *ended, last = piece.split("\n")  # splitlines() would cut at U+2028, too
        for line in ended:
            yield "".join([*start, line])
            start.clear()
        start.append(last)
    yield "".join(start)


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {value!r:.60} is not a JSON object")
    return Row(where, value)


def kind_of(start: bytes) -> str | None:
    """Return what kind of file begins with these bytes; None: it may be text."""
    return next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), None)


def read_text(path: Path) -> str:
    """Return the whole text of a file; as `iter_text`."""
    return "".join(iter_text(path))


def iter_text(path: Path, on_read: OnRead = ignore_bytes) -> Iterator[str]:
    """Yield the text of a file in pieces of at most a megabyte, without byte order mark, CR LF replaced by LF.

    ``.gz`` and ``.zst`` are decompressed. InputError: the file cannot be read, is truncated, damaged, binary or not in
    UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    n_bytes = n_lines = 0
    carry = ""  # a CR that an LF may follow
    for chunk in itertools.chain(_chunks(path, on_read), [b""]):  # the empty chunk tells the decoder that the file ends
        if not n_bytes and (kind := kind_of(chunk)):
            raise InputError(f"{path}: is {kind}; expected text in UTF-8: save or export it as plain text")
        if not n_bytes and (encoding := next((name for mark, name in _OTHER_UTF if chunk.startswith(mark)), None)):
            raise InputError(f"{path}: is {encoding}, expected UTF-8; convert it with iconv -f {encoding} -t UTF-8")
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            wrong, ahead = error.object[error.start], error.object[: error.start]
            at, line = n_bytes + len(chunk) - len(error.object) + error.start, n_lines + ahead.count(b"\n") + 1
            what = f"byte {at} (line {line}) is 0x{wrong:02x}"
            raise InputError(f"{path}: not UTF-8: {what}; convert it with iconv -f ENCODING -t UTF-8") from error
        if not n_bytes and text.count("\0") * 100 > len(text):
            raise InputError(f"{path}: many characters are NUL; expected text, not a binary file")
        n_bytes, n_lines = n_bytes + len(chunk), n_lines + text.count("\n")
        text, carry = carry + text, "\r" if chunk and text.endswith("\r") else ""
        if piece := text.removesuffix(carry).replace("\r\n", "\n"):
            yield piece


def _chunks(path: Path, on_read: OnRead) -> Iterator[bytes]:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error
    with raw:
        stream: Any = raw
        if path.suffix.lower() == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif path.suffix.lower() == ".zst":
            import pyarrow as pa

            stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        at = size = 0
        while True:
            try:
                chunk: bytes = stream.read(PIECE)
                if stream is not raw and raw.tell() == 0:  # empty: an interrupted copy
                    raise EOFError("the file is empty")
            except (OSError, EOFError, zlib.error) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise unreadable(path, error) from error
                reason = " ".join(str(error).split())
                raise InputError(f"{path}: truncated or damaged after {size:,} bytes of text ({reason})") from error
            on_read(raw.tell() - at)
            at, size = raw.tell(), size + len(chunk)
            if size > max(_FREE_BYTES, _MOST_TIMES * at):
                problem = f"decompresses to more than {_MOST_TIMES} times its size"
                raise InputError(f"{path}: {problem}; if that is intended, decompress it first")
            if not chunk:
                return
            yield chunk


def unreadable(path: Path, error: OSError) -> InputError:
    """Return the error for a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return MissingInputError(f"{path}: no such file (current folder: {Path.cwd()})")
    return InputError(f"{path}: cannot be read: {error.strerror or error}")
