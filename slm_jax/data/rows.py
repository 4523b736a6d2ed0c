"""Rows of data with named fields, from JSON, JSON Lines, tables and TensorFlow Datasets."""

import contextlib
import csv
import difflib
import importlib
import importlib.util
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from slm_jax.data.fields import get_field, get_text
from slm_jax.data.text_files import iter_text, read_text, untold
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import check_reachable

CONNECT_SECONDS = 1.5  # offline, TensorFlow Datasets itself would try for minutes
TFDS_URL = "https://storage.googleapis.com"  # tried for a data set that does not say where it comes from
# Where TensorFlow Datasets keeps builders that its list of names lacks until they are imported.
_OLD_BUILDERS = ("text", "summarization", "question_answering", "translate", "text_simplification")

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


def iter_jsonl(path: Path, told: Callable[[int], None] = untold) -> Iterator[Row]:
    """Yield the objects of a file that has one a line, one at a time; empty lines are none.

    Args:
        path: the file; ``.gz`` and ``.zst`` are decompressed.
        told: as for `iter_text`.

    Raises:
        InputError: a file that cannot be read, or is not UTF-8; a line that is no JSON object.
    """
    for number, line in enumerate(_lines(iter_text(path, told)), start=1):
        if line.strip():
            where = f"{path} line {number}"
            value = _parse_json(where, line, "one JSON object a line")
            if not isinstance(value, dict):
                raise InputError(f"{where}: {line!r:.60} is no JSON object; expected one a line")
            yield Row(where, value)


def read_jsonl(path: Path, limit: int | None = None) -> list[Row]:
    """Read the first ``limit`` objects (all, if None) of a file that has one a line; as `iter_jsonl`."""
    return list(itertools.islice(iter_jsonl(path), limit))


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    held: list[str] = []  # of a line that has not ended
    for piece in pieces:
        *ended, last = piece.split("\n")  # splitlines() would cut at U+2028, too
        for line in ended:
            yield "".join([*held, line])
            held.clear()
        held.append(last)
    yield "".join(held)


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
    return list(itertools.islice(iter_tfds(tfds_builder(name), name, split), limit))


def iter_tfds(builder: Any, name: str, split: str) -> Iterator[Row]:
    """Yield the examples of a split of a prepared data set; each is read when it is asked for.

    Raises:
        MissingInputError: no such split, and which there are; files that are damaged.
    """
    where = f"tfds:{name}:{split}"
    try:
        examples = builder.as_data_source(split)
        for i in range(len(examples)):
            yield Row(f"{where} example {i}", {key: _decoded(value) for key, value in examples[i].items()})
    except Exception as error:  # its errors have no narrower base
        raise _no_dataset(where, error) from error


def tfds_builder(name: str) -> Any:
    """Return the builder of a data set, prepared as array records, which can be read without TensorFlow.

    Its ``info.features`` says what there is; what is a class has ``names``.

    Raises:
        MissingInputError: as `read_tfds`; also a data set that only TensorFlow or Apache Beam can prepare or read.
    """
    import tensorflow_datasets as tfds

    def find() -> Any:
        return tfds.builder(name, file_format="array_record", data_dir=os.environ.get("TFDS_DATA_DIR"))

    try:
        try:
            builder = find()
        except tfds.core.DatasetNotFoundError:
            for package in _OLD_BUILDERS:  # registered by their import
                importlib.import_module(f"tensorflow_datasets.{package}")
            builder = find()
    except Exception as error:  # its errors have no narrower base
        raise _no_builder(name, error) from error
    if not (builder.data_path / "dataset_info.json").exists():
        _prepare_tfds(builder, name)
    return builder


def _prepare_tfds(builder: Any, name: str) -> None:
    """Download a data set and write it as array records."""
    import tensorflow_datasets as tfds

    if isinstance(builder, tfds.core.BeamBasedBuilder) and importlib.util.find_spec("apache_beam") is None:
        raise _needs(name, "Apache Beam")
    source = next(iter(builder.url_infos or ()), TFDS_URL)
    try:
        check_reachable(source, CONNECT_SECONDS)
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except Exception as error:  # its errors have no narrower base
        if isinstance(error, ImportError) and "tensorflow" in str(error):
            raise _needs(name, "TensorFlow") from error
        raise _no_dataset(f"tfds:{name}", error, urlsplit(source).netloc) from error


def _needs(name: str, library: str) -> MissingInputError:
    return MissingInputError(
        f"tfds:{name}: only {library} can prepare it, which is not installed; where it is, prepare it with "
        "tfds build --file_format=array_record and copy it into TFDS_DATA_DIR (default ~/tensorflow_datasets), or "
        "write its texts to a file for parquet: or jsonl:"
    )


def _no_builder(name: str, error: Exception) -> MissingInputError:
    """Say what a name should have been, or how a data set should have been prepared."""
    import tensorflow_datasets as tfds

    dataset, _, config = name.partition("/")
    if isinstance(error, tfds.core.DatasetNotFoundError):
        near = difflib.get_close_matches(dataset, tfds.list_builders(with_community_datasets=False), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "its names are listed at tensorflow.org/datasets"
        return MissingInputError(f"tfds:{name}: TensorFlow Datasets has nothing of that name; {hint}")
    if "does not match the file formats" in str(error):
        return MissingInputError(
            f"tfds:{name}: is prepared, but in a format that only TensorFlow reads ({' '.join(str(error).split())}); "
            "prepare it again as array_record: tfds build --file_format=array_record"
        )
    with suppress(Exception):  # a name that no class has
        known = list(tfds.builder_cls(dataset).builder_configs)
        if config and config not in known:
            near = difflib.get_close_matches(config, known, n=5, cutoff=0.5)
            hint = f" (did you mean {', '.join(near)}?)" if near else ""
            expected = f"one of {', '.join(known)}" if known else "none: leave it out"
            return MissingInputError(
                f"tfds:{name}: {dataset} has no configuration {config!r}{hint}; expected {expected:.300}"
            )
    return _no_dataset(f"tfds:{name}", error)


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
