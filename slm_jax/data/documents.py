"""The documents of a text source, one after the other, each in pieces, so that no source has to fit into memory."""

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.data.builtin import python_docs
from slm_jax.data.named import NAMED_FILES, named_file, plain_text_names
from slm_jax.data.rows import iter_jsonl, iter_tfds, tfds_builder
from slm_jax.data.sources import KINDS, matching_files, parse_source
from slm_jax.data.text_files import iter_text, untold
from slm_jax.errors import InputError
from slm_jax.tokenizer import END_OF_TEXT

BUILTINS = {"python-docs": python_docs}
TEXT_COLUMN = "text"  # what it is called unless the user says otherwise
_ROWS = 64  # of a Parquet file, in memory at a time


def documents(
    source: str,
    text_column: str | None = None,
    told: Callable[[int], None] = untold,
    passed_over: Callable[[], None] = lambda: None,
) -> Iterator[Iterator[str]]:
    """Return the documents of a text source, each as an iterator of its pieces, in a fixed order.

    A file of ``text:`` or ``named:`` and a row of ``jsonl:``, ``parquet:`` or ``tfds:`` is a document, or several where
    it holds a literal ``<|endoftext|>``; what is only white space is none. Files come sorted by path. A document is to
    be read before the next one is asked for. Of files about a megabyte is in memory at a time, of rows one (of Parquet
    64), and of a document the white space that it starts with.

    Args:
        source: ``KIND:REST``, of any kind but ``tokens:``.
        text_column: where the texts of rows are; default: ``text``, and in ``tfds:`` else the only text feature.
        told: called with the number of bytes that were read of files since the last call.
        passed_over: called for each file or row without a document: null, empty or only white space.

    Raises:
        InputError: a source that cannot be read, or has no documents.
    """
    texts = _texts(source, text_column, told)  # which files there are is known from now on
    return _documents(source, texts, passed_over)


def read_documents(source: str, text_column: str | None = None) -> list[str]:
    """Return the texts of a source, in a fixed order, each whole.

    Each file or row is one, without those of only white space. Of files, CR LF becomes LF and a byte order mark is left
    out; nothing else is touched: a literal ``<|endoftext|>`` stays, and whether to split there, refuse it or encode it
    as plain characters is for the caller to decide. Arguments and errors are those of `documents`.
    """
    texts = [text for pieces in _texts(source, text_column, untold) if (text := "".join(pieces)).strip()]
    if not texts:
        raise _no_text(source)
    return texts


def source_files(source: str) -> list[Path] | None:
    """Return the files that a source is read from; None where it does not name them."""
    kind, rest = parse_source(source)
    return matching_files(rest) if kind in ("text", "jsonl", "parquet") else None


def source_bytes(source: str) -> int | None:
    """Return the size of these files, as they lie there."""
    files = source_files(source)
    return None if files is None else sum(path.stat().st_size for path in files if path.exists())


def _documents(source: str, texts: Iterable[Iterator[str]], passed_over: Callable[[], None]) -> Iterator[Iterator[str]]:
    n = 0
    for text in texts:
        n_before = n
        for document in _split(text):
            n += 1
            yield document
        if n == n_before:
            passed_over()
    if not n:
        raise _no_text(source)


def _texts(source: str, text_column: str | None, told: Callable[[int], None]) -> Iterator[Iterator[str]]:
    """Yield the pieces of each file or row."""
    kind, rest = parse_source(source)
    column = text_column or TEXT_COLUMN
    if kind == "tokens":
        raise InputError(f"source {source!r} holds token ids, expected text, such as {KINDS['text']}")
    if kind == "builtin":
        if rest not in BUILTINS:
            raise InputError(f"source {source!r}: nothing built in under that name; expected builtin:python-docs")
        return _in_one_piece(BUILTINS[rest]())
    if kind == "named":
        if rest in NAMED_FILES and not NAMED_FILES[rest].plain_text:
            raise InputError(
                f"source {source!r} is labelled data, for fine-tuning; "
                f"expected plain text: {', '.join(f'named:{name}' for name in plain_text_names())}"
            )
        return iter([iter_text(named_file(rest), told)])
    if kind == "tfds":
        return _in_one_piece(_tfds_texts(rest, text_column))
    files = matching_files(rest)
    if kind == "text":
        return (iter_text(path, told) for path in files)
    read = _jsonl_texts if kind == "jsonl" else _parquet_texts
    return _in_one_piece(text for path in files for text in read(path, column, told))


def _in_one_piece(texts: Iterable[str | None]) -> Iterator[Iterator[str]]:
    return (iter([text or ""]) for text in texts)


def _jsonl_texts(path: Path, column: str, told: Callable[[int], None]) -> Iterator[str | None]:
    for row in iter_jsonl(path, told):
        if column not in row.fields:
            raise _no_column(row.where, column, row.fields)
        yield None if row.fields[column] is None else row.text(column)


def _parquet_texts(path: Path, column: str, told: Callable[[int], None]) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, row, told_of = path.stat().st_size, 0, 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:  # else a whole row group is read
            schema = file.schema_arrow
            if column not in schema.names:
                raise _no_column(str(path), column, schema.names)
            if schema.names.count(column) > 1:
                raise InputError(f"{path}: column {column!r} is there twice; rename one, or set text_column to another")
            kind = schema.field(column).type
            if not _is_text(kind):
                raise InputError(f"{path}: column {column!r} holds {kind}, expected text; set text_column to another")
            for batch in file.iter_batches(_ROWS, columns=[column]):
                texts = batch.column(column)  # by name: a struct's field can have the same dotted path
                yield from texts.cast(pa.large_string()).to_pylist()
                row += len(batch)
                at = size * row // file.metadata.num_rows
                told(at - told_of)
                told_of = at
    except InputError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read as Parquet, after {row:,} rows ({' '.join(str(error).split()):.200}); "
            "copy or download it again, or use another kind of source if it is something else"
        ) from error


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


def _tfds_texts(rest: str, text_column: str | None) -> Iterator[str | None]:
    name, _, split = rest.partition(":")
    builder = tfds_builder(name)
    column = _text_feature(f"tfds:{name}", builder.info.features, text_column)
    for row in iter_tfds(builder, name, split or "train"):
        yield row.text(column)


def _text_feature(where: str, features: Any, text_column: str | None) -> str:
    """Return the feature that holds the texts: the one asked for, ``text``, or the only one that can."""
    import tensorflow_datasets as tfds

    if not isinstance(features, tfds.features.FeaturesDict):
        raise InputError(f"{where}: its examples have no named features; expected one that is text")
    texts = [name for name, feature in features.items() if feature.shape == () and feature.np_dtype == np.object_]
    if text_column is not None and text_column not in texts:
        raise _no_column(where, text_column, texts)
    if text_column is not None or TEXT_COLUMN in texts:
        return text_column or TEXT_COLUMN
    if len(texts) != 1:
        raise InputError(f"{where}: its text features are {', '.join(texts) or 'none'}; set text_column to one of them")
    return texts[0]


def _no_column(where: str, column: str, there: Iterable[str]) -> InputError:
    names = list(there)
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    known = f"{', '.join(names) or 'none':.300}"
    return InputError(f"{where}: no text column {column!r}{hint} but {known}; set text_column to one of them")


def _no_text(source: str) -> InputError:
    return InputError(f"source {source!r}: empty text: nothing there holds more than white space")


def _split(pieces: Iterable[str]) -> Iterator[Iterator[str]]:
    """Yield the documents of a text: what is between literal marks of the end of text and more than white space."""
    parts = (part for part in _cut_at_marks(pieces) if part != "")
    for document in iter(lambda: _next_document(parts), None):
        yield document
        for _ in document:  # what nobody wanted
            pass


def _next_document(parts: Iterator[str | None]) -> Iterator[str] | None:
    start: list[str] = []
    for part in parts:
        if part is None:
            start.clear()
            continue
        start.append(part)
        if part.strip():
            return itertools.chain(start, _until_mark(parts))
    return None


def _until_mark(parts: Iterator[str | None]) -> Iterator[str]:
    for part in parts:
        if part is None:
            return
        yield part


def _cut_at_marks(pieces: Iterable[str]) -> Iterator[str | None]:
    """Yield the pieces without the marks, and None for each mark, also for one that goes across pieces."""
    held = ""
    for piece in pieces:
        *ended, last = (held + piece).split(END_OF_TEXT)
        for part in ended:
            yield part
            yield None
        n_held = next((n for n in range(len(END_OF_TEXT) - 1, 0, -1) if last.endswith(END_OF_TEXT[:n])), 0)
        held = last[len(last) - n_held :]
        yield last[: len(last) - n_held]
    yield held
