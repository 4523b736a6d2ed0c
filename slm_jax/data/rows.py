"""Rows of data with named fields, from JSON, JSON Lines, tables and TensorFlow Datasets."""

import csv
import difflib
import importlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from slm_jax.data.sources import read_text
from slm_jax.errors import InputError, MissingInputError
from slm_jax.fields import get_field, get_text
from slm_jax.network import check_reachable

CONNECT_SECONDS = 4.0  # offline, TensorFlow Datasets itself would try for minutes
TFDS_URL = "https://storage.googleapis.com"  # tried for a data set that does not say where it comes from


_JSON_TYPES = {
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class Row(NamedTuple):
    """One example: its fields, and where it stands, such as ``spam.csv line 12``, for messages."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """Return a field that must be text."""
        return get_text(self.fields, name, self.where)

    def field(self, name: str) -> Any:
        """Return a field that must be there."""
        return get_field(self.fields, name, self.where)


# Files


def read_jsonl(path: Path, limit: int | None = None) -> list[Row]:
    """Read the first ``limit`` objects (all, if None) of a file that has one a line; empty lines are none.

    Raises:
        InputError: a file that cannot be read, or is not UTF-8; a line that is no JSON object.
    """
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # splitlines() would cut at U+2028, too
        if line.strip():
            where = f"{path} line {number}"
            value = _parse_json(where, line, "one JSON object a line")
            if not isinstance(value, dict):
                raise InputError(f"{where}: {line!r:.60} is no JSON object; expected one a line")
            rows.append(Row(where, value))
        if len(rows) == limit:
            break
    return rows


def read_json(path: Path) -> list[Row]:
    """Read a file that is one list of objects; the first is ``entry 1``.

    Raises:
        InputError: a file that cannot be read, or is not UTF-8, or anything else.
    """
    content = _parse_json(str(path), read_text(path), "one list of JSON objects")
    if not isinstance(content, list):
        found = f"one object with {', '.join(content) or 'nothing'}" if isinstance(content, dict) else repr(content)
        raise InputError(f"{path}: {found:.90} is no list; expected one list of JSON objects")
    rows = [Row(f"{path} entry {number}", value) for number, value in enumerate(content, start=1)]
    for where, value in rows:
        if not isinstance(value, dict):
            raise InputError(f"{where}: is {_JSON_TYPES[type(value)]}, no JSON object; expected a list of objects")
    return rows


def read_table(path: Path, delimiter: str, columns: Sequence[str] = ()) -> list[Row]:
    r"""Read a table with a header line, or, if ``columns`` names them, without one; empty lines are no rows.

    Fields between commas may be quoted (RFC 4180); between tabs quotes are characters like any other.

    Args:
        path: the file.
        delimiter: ``,`` or ``\t``.
        columns: the names of the columns of a file without a header line.

    Raises:
        InputError: a file that cannot be read, or is not UTF-8; a column that is there twice; a line with too few or
            too many fields; a quote that is not closed.
    """
    lines = _split_table(path, read_text(path), delimiter)
    where, names = ("columns", list(columns)) if columns else next(lines, (str(path), []))
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise InputError(f"{where}: column {twice[0]!r} is there twice ({', '.join(names)}); expected distinct names")
    rows: list[Row] = []
    for where, values in lines:
        if len(values) != len(names):
            quotes = "; put a field that holds a comma in quotes" if delimiter == "," else ""
            raise InputError(
                f"{where}: has {_count(len(values), 'field')}, expected {len(names)} ({', '.join(names):.200}){quotes}"
            )
        rows.append(Row(where, dict(zip(names, values, strict=True))))
    return rows


def _split_table(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield where each line of a table is, and its fields."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    while True:
        where = f"{path} line {reader.line_num + 1}"  # a quoted field may hold line breaks; where it begins
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{where}: {error}; expected fields separated by {delimiter!r}, "
                "quoted as in RFC 4180, or use jsonl:FILE"
            ) from None
        if values:
            yield where, values


def _parse_json(where: str, text: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        found = text.split("\n")[error.lineno - 1]
        problem = f"{error.msg} at {line}column {error.colno}"
        raise InputError(f"{where}: not JSON ({problem}): {found!r:.60}; expected {expected}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        raise InputError(f"{where}: JSON that cannot be read ({error}); expected {expected}") from None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# TensorFlow Datasets


def read_tfds(name: str, split: str, limit: int | None = None) -> list[Row]:
    """Read the first ``limit`` examples (all, if None) of a data set of TensorFlow Datasets, downloaded once.

    Args:
        name: ``imdb_reviews``, or with a configuration, ``glue/sst2``.
        split: ``train``, or any of its expressions, such as ``train[:1000]``.
        limit: at least 1.

    Raises:
        MissingInputError: no such data set or split; without a network, within five seconds, one to be downloaded.
    """
    builder = tfds_builder(name)
    where = f"tfds:{name}:{split}"
    try:
        examples = builder.as_data_source(split)
    except Exception as error:  # its errors have no narrower base
        raise _no_dataset(where, error) from error
    n = len(examples) if limit is None else min(limit, len(examples))
    return [Row(f"{where} example {i}", {key: _decoded(value) for key, value in examples[i].items()}) for i in range(n)]


def tfds_builder(name: str) -> Any:
    """Return the builder of a data set, prepared as array records, which can be read without TensorFlow.

    Its ``info.features`` says what there is; what is a class has ``names``.

    Raises:
        MissingInputError: as `read_tfds`.
    """
    import tensorflow_datasets as tfds

    module = name.partition("/")[0]
    with suppress(ImportError):  # the older ones are registered by their import
        importlib.import_module(f"tensorflow_datasets.text.{module}")
    source = ""
    try:
        builder = tfds.builder(name, file_format="array_record", data_dir=os.environ.get("TFDS_DATA_DIR"))
        if not (builder.data_path / "dataset_info.json").exists():
            source = next(iter(builder.url_infos or ()), TFDS_URL)
            check_reachable(source, CONNECT_SECONDS)
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(module, tfds.list_builders(with_community_datasets=False), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "its names are listed at tensorflow.org/datasets"
        raise MissingInputError(f"tfds:{name}: TensorFlow Datasets has nothing of that name; {hint}") from None
    except Exception as error:  # its errors have no narrower base
        raise _no_dataset(f"tfds:{name}", error, urlsplit(source).netloc) from error
    return builder


def _no_dataset(where: str, error: Exception, host: str = "") -> MissingInputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return MissingInputError(
        f"{where}: {reason:.400}; expected it as array records in TFDS_DATA_DIR (default ~/tensorflow_datasets)"
        f"{f', or a way to download it from {host}' if host else ''}; or use jsonl:FILE"
    )


def _decoded(value: Any) -> Any:
    """Turn what TensorFlow Datasets gives into what JSON would: text is bytes there, and a number NumPy's."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")  # a picture, which nobody reads as text
    if isinstance(value, list | np.ndarray):
        return [_decoded(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
