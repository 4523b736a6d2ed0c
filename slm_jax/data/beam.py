"""`slm_jax.data.prepare` on many machines: an Apache Beam pipeline that keeps the same documents.

    read → filter → exact copies → near duplicates → encode → shuffle → shards

Documents have a number that says which of two copies is the earlier one, so that nothing depends on who reads them.
They are shuffled: the order is that of a hash of their numbers. Shards are written beside the token file, and get their
names when all are there, together with the index, ``FILE.bin.json``. Files may be of any file system that Beam knows,
such as ``gs://``. Memory holds a document, or a shard; a file is read by one worker.
"""

import importlib.util
import json
import logging
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.data.beam_shards import (
    KEPT,
    Document,
    count_bytes,
    count_shards,
    empty_shards,
    encode,
    place_of,
    smallest,
    to_shard,
    write_index,
    write_shard,
)
from slm_jax.data.filters import DEFAULT_RULES, Rules, digest, mark_copies
from slm_jax.data.near_duplicates import BANDS, are_similar, band_keys, signature
from slm_jax.data.prepare import Prepared
from slm_jax.data.rows import Source
from slm_jax.data.sources import parse_source
from slm_jax.data.token_file import (
    existing_paths,
    json_path,
    token_dtype,
    token_paths,
)
from slm_jax.errors import InputError, MissingInputError
from slm_jax.tokenizer import Tokenizer

RUNNERS = {"direct": "FnApiRunner", "dataflow": "DataflowRunner", "spark": "SparkRunner", "flink": "FlinkRunner"}
SHARD_TOKENS = 100_000_000
TFDS_ROWS = 10_000  # rows of a data set that a worker reads at a time


def prepare(
    sources: Sequence[Source],
    out: str,
    tokenizer: Tokenizer,
    *,
    runner: str,
    options: Sequence[str] = (),
    text_column: str | None = None,
    rules: Rules = DEFAULT_RULES,
    shard_tokens: int = SHARD_TOKENS,
) -> Prepared:
    """Run the pipeline, and return what it counted.

    ``runner`` is a key of `RUNNERS`, ``options`` are Beam's own, such as ``--project=NAME``; ``shard_tokens`` is about
    how many ids a shard has. InputError: as of `slm_jax.data.prepare.prepare` and `make_pipeline`.
    """
    tokenizer.encode("")  # raises if the tokenizer's files are missing, before anything is read
    is_local = "://" not in out
    replaced = existing_paths(Path(out)) if is_local else []
    with _in_one_line(runner):
        with make_pipeline(runner, options) as pipeline:
            build(pipeline, sources, out, tokenizer, text_column=text_column, rules=rules, shard_tokens=shard_tokens)
        about = _read_index(f"{out}.json")
    for old in set(replaced) - {json_path(Path(out)), *token_paths(Path(out), about)}:
        old.unlink()
    return Prepared(about["documents"], about["tokens"], about["text_bytes"], 0, about["counts"], about["sha256"])


@contextmanager
def _in_one_line(runner: str) -> Iterator[None]:
    """Raise the InputError of a worker, which runners hand on as text, and Beam's own errors on options, as one."""
    try:
        yield
    except Exception as error:  # runners' errors have no narrower base
        lines = [line for line in str(error).splitlines() if "InputError: " in line or isinstance(error, InputError)]
        if not lines and runner == "direct":
            raise
        if not lines:  # a service that cannot be reached, or that gave up
            raise InputError(f"runner {runner}: {' '.join(str(error).split()) or type(error).__name__:.400}") from error
        raise InputError(re.sub(r"^.*InputError: | \[while running .*", "", lines[-1])) from error


def _read_index(path: str) -> dict[str, Any]:
    from apache_beam.io.filesystems import FileSystems

    with FileSystems.open(path) as file:
        about: dict[str, Any] = json.loads(file.read())
    return about


def check_installed(runner: str) -> None:
    """Raise MissingInputError if Apache Beam is not installed."""
    if importlib.util.find_spec("apache_beam") is None:
        raise MissingInputError(f"runner is {runner}, which needs Apache Beam; install it: pip install 'slm-jax[beam]'")


def check_new_url(out: str, overwrite: bool) -> None:
    """Raise InputError if a token file of any file system exists, or that file system cannot be used."""
    from apache_beam.io.filesystems import FileSystems

    if not out.endswith(".bin"):
        raise InputError(f"out is {out!r}; expected a file FILE.bin, such as gs://BUCKET/tokens.bin")
    with _reachable(out):
        exists = FileSystems.exists(f"{out}.json")
    if exists and not overwrite:
        raise InputError(f"{out}.json: exists; choose another --out, or add --overwrite true")


@contextmanager
def _reachable(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # those of file systems have no narrower base
        raise InputError(f"{url}: {' '.join(str(error).split()) or type(error).__name__:.400}") from error


def make_pipeline(runner: str, options: Sequence[str]) -> Any:
    """Return an empty pipeline of a runner; InputError: an option that Beam refuses, or a library that is missing."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    try:
        if runner == "direct":  # Beam's own choice may be a program that it downloads
            logging.getLogger("apache_beam.runners").setLevel(logging.CRITICAL)  # it logs errors that it also raises
            return beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(list(options)))
        return beam.Pipeline(options=PipelineOptions([f"--runner={RUNNERS[runner]}", *options]))
    except ImportError as error:
        raise MissingInputError(f"runner is {runner}: {error}; install it: pip install 'apache-beam[gcp]'") from None
    except ValueError as error:
        raise InputError(f"beam_options: {' '.join(str(error).split())}") from None


def build(
    pipeline: Any,
    sources: Sequence[Source],
    out: str,
    tokenizer: Tokenizer,
    *,
    text_column: str | None = None,
    rules: Rules = DEFAULT_RULES,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Add all steps to a pipeline; arguments as of `prepare`."""
    import apache_beam as beam
    from apache_beam.pvalue import AsDict, AsList, AsSingleton

    units = list(enumerate(units_of(sources)))
    source = " ".join(map(str, sources))
    coded = json.dumps(tokenizer.to_dict())
    found = (
        pipeline
        | "files" >> beam.Create(units)
        | "spread files" >> beam.Reshuffle()
        | "read and filter" >> beam.FlatMap(_read, text_column, rules)
    )
    counts = found | "reasons" >> beam.Map(_reason) | "count reasons" >> beam.combiners.Count.PerElement()
    kept = found | "kept" >> beam.Filter(_has_reason, KEPT) | "documents" >> beam.Map(_document)
    long = found | "too long to filter" >> beam.Filter(_has_reason, "unfiltered") | "long" >> beam.Map(_document)
    distinct = _drop_copies(kept) if rules.deduplicate else kept
    different = distinct if rules.near_duplicates is None else _drop_near_duplicates(distinct, rules.near_duplicates)
    encoded = (different, long) | "all documents" >> beam.Flatten() | "encode" >> beam.Map(encode, source, coded)
    n_ids = encoded | "lengths" >> beam.Map(count_bytes) | "sum" >> beam.CombineGlobally(sum)
    first = encoded | "places" >> beam.Map(place_of) | "first" >> beam.CombineGlobally(smallest)
    dtype = token_dtype(tokenizer.vocab_size).str
    n_shards = n_ids | "number of shards" >> beam.Map(count_shards, shard_tokens, np.dtype(dtype).itemsize)
    partial = f"{out}.{uuid.uuid4().hex[:8]}.partial"  # shards, until they get their names
    shards = (
        (
            encoded | "to shards" >> beam.Map(to_shard, AsSingleton(n_shards)),
            n_shards | "every shard" >> beam.FlatMap(empty_shards),
        )
        | "to be written" >> beam.Flatten()
        | "shuffle" >> beam.GroupByKey()
        | "write" >> beam.Map(write_shard, partial, dtype, AsSingleton(first))
    )
    n_left = [
        AsSingleton(documents | f"count {what}" >> beam.combiners.Count.Globally())
        for what, documents in (("distinct", distinct), ("different", different))
    ]
    (
        pipeline
        | "once" >> beam.Create([source])
        | "index" >> beam.Map(write_index, out, coded, AsList(shards), AsDict(counts), *n_left)
    )


# Read


def units_of(sources: Sequence[Source]) -> list[str]:
    """Return sources that each a worker can read alone, in order: files, and ranges of data sets."""
    units: list[str] = []
    for source in sources:
        if "://" in source.name:
            units += [f"{source.scheme}:{url}" for url in _match(source.name)]
        elif (files := source.files()) is not None:
            units += [f"{source.scheme}:{file.resolve()}" for file in files]
        elif source.scheme == "tfds":
            units += _ranges(source)
        else:
            units.append(str(source))
    return units


def _match(pattern: str) -> list[str]:
    from apache_beam.io.filesystems import FileSystems

    with _reachable(pattern):
        found = sorted(file.path for match in FileSystems.match([pattern]) for file in match.metadata_list)
    if not found:
        raise MissingInputError(f"{pattern}: no file matches; quote patterns")
    return found


def _ranges(source: Any) -> list[str]:
    name, _, split = source.name.partition(":")
    split = split or source.split
    if split not in source.builder.info.splits or "[" in split:  # a part, several, or none, which reading refuses
        return [f"tfds:{name}:{split}"]
    n_rows = source.builder.info.splits[split].num_examples
    return [f"tfds:{name}:{split}[{i}:{min(n_rows, i + TFDS_ROWS)}]" for i in range(0, n_rows, TFDS_ROWS)]


def _read(unit: tuple[int, str], text_column: str | None, rules: Rules) -> Iterator[tuple[str, Document]]:
    """Yield the documents of a file, each after the reason to leave it out, or `KEPT`; those left out are empty."""
    number, name = unit
    place = number << 40  # of the first document; no file has a trillion
    n_empty = 0

    def count_empty() -> None:
        nonlocal n_empty
        n_empty += 1

    with _local(name) as source:
        held: list[str] = []  # the pieces of a document that is too long to be filtered
        for text in mark_copies(source.documents(text_column, on_empty=count_empty, may_be_empty=True), False):
            if held and text.is_start:
                yield "unfiltered", (place, "".join(held))
                place, held = place + 1, []
            if not text.is_whole:
                held.append(text.text)
                continue
            reason = rules.low_quality(text.text)
            yield reason or KEPT, (place, "" if reason else text.text)
            place += 1
        if held:
            yield "unfiltered", (place, "".join(held))
    yield from [("empty", (place, ""))] * n_empty


@contextmanager
def _local(name: str) -> Iterator[Source]:
    """Give the source, with a file of another file system copied to this machine."""
    scheme, _, path = name.partition(":")
    if "://" not in path:
        yield parse_source(name)
        return
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.rpartition("/")[2])
        with (
            FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as there,
            copy.open("wb") as here,
        ):
            shutil.copyfileobj(there, here)
        yield parse_source(f"{scheme}:{copy}")


def _reason(found: tuple[str, Document]) -> str:
    return found[0]


def _has_reason(found: tuple[str, Document], reason: str) -> bool:
    return found[0] == reason


def _document(found: tuple[str, Document]) -> Document:
    return found[1]


# Copies


def _drop_copies(documents: Any) -> Any:
    """Keep the first of the documents that are equal."""
    import apache_beam as beam

    return (
        documents
        | "digest" >> beam.Map(_with_digest)
        | "first copy" >> beam.CombinePerKey(min)
        | "distinct" >> beam.Values()
    )


def _with_digest(document: Document) -> tuple[bytes, Document]:
    return digest(document[1]), document


def _drop_near_duplicates(documents: Any, threshold: float) -> Any:
    """Leave out what `find_near_duplicates` finds. Only numbers and signatures are sent around, until the last step."""
    import apache_beam as beam

    signatures = documents | "signatures" >> beam.Map(_with_signature)
    pairs = (
        signatures
        | "bands" >> beam.FlatMap(_bands)
        | "equal bands" >> beam.GroupByKey()
        | "later and first" >> beam.FlatMap(_pairs)
    )
    found = (
        {"of": signatures, "first": pairs} | "signatures of the later" >> beam.CoGroupByKey()
    ) | "to the first" >> beam.FlatMap(_to_first)
    found = (
        {"of": signatures, "later": found} | "signatures of the first" >> beam.CoGroupByKey()
    ) | "compare" >> beam.FlatMap(_compare, threshold)
    return (
        {"text": documents, "found": found} | "documents and near duplicates" >> beam.CoGroupByKey()
    ) | "different" >> beam.FlatMap(_not_found)


def _with_signature(document: Document) -> tuple[int, bytes]:
    return document[0], signature(document[1]).tobytes()


def _array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint32)[None]


def _bands(signed: tuple[int, bytes]) -> Iterator[tuple[tuple[int, int], int]]:
    for band in range(BANDS):
        yield (band, int(band_keys(_array(signed[1]), band).view(np.int64)[0])), signed[0]


def _pairs(group: tuple[Any, Iterable[int]]) -> Iterator[tuple[int, int]]:
    first = min(group[1])
    yield from ((number, first) for number in group[1] if number != first)


def _to_first(group: tuple[int, dict[str, Any]]) -> Iterator[tuple[int, tuple[int, bytes]]]:
    number, found = group
    for first in set(found["first"]):
        for signed in found["of"]:
            yield first, (number, signed)


def _compare(group: tuple[int, dict[str, Any]], threshold: float) -> Iterator[tuple[int, bool]]:
    for first in group[1]["of"]:
        for number, signed in group[1]["later"]:
            if are_similar(_array(first), _array(signed), threshold)[0]:
                yield number, True


def _not_found(group: tuple[int, dict[str, Any]]) -> Iterator[Document]:
    number, found = group
    if not any(found["found"]):
        for text in found["text"]:
            yield number, text
