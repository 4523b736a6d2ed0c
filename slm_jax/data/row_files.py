"""Files of rows: ``jsonl:``, ``json:``, ``csv:``, ``tsv:`` and ``parquet:`` sources."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from slm_jax.data.rows import OnRead, Row, Source, ignore_bytes, no_field
from slm_jax.data.text_files import iter_text, matching_files
from slm_jax.errors import InputError

_PARQUET_ROWS = 64  # in memory at a time


class _RowFiles(Source):
    """Files with rows, one after the other, sorted by path."""

    def files(self) -> list[Path]:
        """Return the files that match, sorted."""
        return matching_files(self.name)

    def rows(self, columns: Sequence[str] = (), on_read: OnRead = ignore_bytes) -> Iterator[Row]:
        """Return the rows of all files."""
        return (row for path in self.files() for row in self._read(path, columns, on_read))

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> Iterable[Row]:
        raise NotImplementedError


class JsonLines(_RowFiles):
    """One JSON object a line."""

    scheme, form = "jsonl", "jsonl:GLOB"

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> Iterator[Row]:
        for number, line in enumerate(_lines(iter_text(path, on_read)), start=1):
            if line.strip():
                yield _object(f"{path} line {number}", _parse_json(f"{path} line {number}", line))


class Json(_RowFiles):
    """A list of JSON objects."""

    scheme, form = "json", "json:GLOB"

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> list[Row]:
        return read_json_rows(path, on_read)


class Table(_RowFiles):
    """A table with a header line, or without one if `header` names its columns; empty lines are skipped."""

    delimiter: ClassVar[str]

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> Iterator[Row]:
        lines = _split_table(path, "".join(iter_text(path, on_read)), self.delimiter)
        where, names = ("columns", list(self.header)) if self.header else next(lines, (str(path), []))
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise InputError(f"{where}: column {twice[0]!r} occurs twice ({', '.join(names)}); expected distinct names")
        for where, values in lines:
            if len(values) != len(names):
                raise InputError(f"{where}: {len(values)} fields, expected {len(names)} ({', '.join(names):.200})")
            yield Row(where, dict(zip(names, values, strict=True)))


class Csv(Table):
    """Fields between commas, quoted as in RFC 4180."""

    scheme, form, delimiter = "csv", "csv:GLOB", ","


class Tsv(Table):
    """Fields between tabs; quotes are ordinary characters."""

    scheme, form, delimiter = "tsv", "tsv:GLOB", "\t"


class Parquet(_RowFiles):
    """Apache Parquet; only the columns that are needed are read."""

    scheme, form = "parquet", "parquet:GLOB"

    def _read(self, path: Path, columns: Sequence[str], on_read: OnRead) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        size, n_read, reported = path.stat().st_size, 0, 0
        try:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:  # else reads whole row groups
                names = list(columns) or file.schema_arrow.names
                for name in names:
                    if name not in file.schema_arrow.names:
                        raise no_field(str(path), name, file.schema_arrow.names)
                    if file.schema_arrow.names.count(name) > 1:
                        raise InputError(f"{path}: column {name!r} occurs twice; expected distinct names")
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


def read_json_rows(path: Path, on_read: OnRead = ignore_bytes) -> list[Row]:
    """Read a file that is one list of JSON objects, the first ``entry 1``; InputError: it holds something else."""
    content = _parse_json(str(path), "".join(iter_text(path, on_read)))
    if not isinstance(content, list):
        raise InputError(f"{path}: {content!r:.60} is not a list; expected one list of JSON objects")
    return [_object(f"{path} entry {number}", value) for number, value in enumerate(content, start=1)]


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    start: list[str] = []  # of the line that has not ended
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


def _parse_json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = text.split("\n")[error.lineno - 1]
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise InputError(f"{where}: not JSON ({error.msg} at {line}column {error.colno}): {found!r:.60}") from None
    except (ValueError, RecursionError) as error:  # a number with too many digits, brackets nested too deep
        raise InputError(f"{where}: JSON that cannot be read ({error})") from None


def _split_table(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the fields of each line of a table."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    while True:
        where = f"{path} line {reader.line_num + 1}"  # where it begins: a quoted field may hold line breaks
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{where}: {error}; expected fields separated by {delimiter!r}") from None
        if values:
            yield where, values


def _as_python(column: Any) -> list[Any]:
    """Return a Parquet column's values; binary ones as text."""
    import pyarrow as pa

    binary = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    values: list[Any] = (column.cast(pa.large_string()) if binary else column).to_pylist()
    return values
