"""`slm_jax.data.prepare` on many machines, as an Apache Beam pipeline that keeps the same documents.

    read → normalize → filter → exact copies → near duplicates → encode → shuffle → shards

Documents are numbered in order, so that the earlier of two copies is known whichever worker reads them. They are
shuffled by a hash of their numbers. Shards are written into a folder beside the token file, and renamed when all are
complete, together with the index, ``FILE.bin.json``. Files may be in any file system that Beam supports, such as
``gs://``. Memory holds one document or one shard; each file is read by one worker.
"""

import dataclasses
import importlib.util
import json
import logging
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.data.beam_shards import KEPT, Document, encode, to_shard, write_index, write_shard
from slm_jax.data.filters import DEFAULT_RULES, Rules, digest, mark_copies
from slm_jax.data.near_duplicates import BANDS, ROWS, are_similar, band_keys, signature
from slm_jax.data.parts import Job
from slm_jax.data.prepare import Prepared
from slm_jax.data.rows import Source
from slm_jax.data.sources import parse_source
from slm_jax.data.token_file import existing_paths, json_path, token_dtype, token_paths
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import is_url
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

    ``runner`` is a key of `RUNNERS`; ``options`` are Beam's options, such as ``--project=NAME``; ``shard_tokens`` is
    the approximate number of ids per shard. InputError: as in `slm_jax.data.prepare.prepare` and `make_pipeline`.
    """
    tokenizer.encode("")  # raises if the tokenizer's files are missing, before anything is read
    from apache_beam.io.filesystems import FileSystems

    replaced = [] if is_url(out) else existing_paths(Path(out))
    folder = f"{out}.{uuid.uuid4().hex[:8]}.partial"  # for shards, until they are renamed
    with _in_one_line(f"runner {runner}", keep_bugs=runner == "direct"):
        try:
            with make_pipeline(runner, options) as pipeline:
                build(pipeline, sources, out, folder, tokenizer, text_column, rules, shard_tokens)
        finally:
            # After an interrupt, a pipeline on other machines continues.
            if runner == "direct" or not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                for path in (folder, f"{folder}/"):  # a folder on a disk; all objects below it in object storage
                    with suppress(OSError):
                        FileSystems.delete([path])
        with FileSystems.open(f"{out}.json") as file:
            about = json.loads(file.read())
    for old in set(replaced) - {json_path(Path(out)), *token_paths(Path(out), about)}:
        old.unlink()
    return Prepared(about["documents"], about["tokens"], about["text_bytes"], 0, about["counts"], about["sha256"])


@contextmanager
def _in_one_line(where: str, keep_bugs: bool = False) -> Iterator[None]:
    """Raise an InputError for any error of Beam, a file system or a service; errors of workers arrive as text.

    ``keep_bugs``: whether to let other errors pass, with their traceback.
    """
    try:
        yield
    except Exception as error:  # errors of runners and file systems have no common base class
        kinds: list[type[Exception]] = [InputError, MissingInputError, OSError, *OSError.__subclasses__()]
        found = re.findall(rf"\b(?:{'|'.join(kind.__name__ for kind in kinds)}): (.*)", str(error))
        if found or isinstance(error, InputError):
            raise InputError(re.sub(r" \[while running .*", "", (found or [str(error)])[-1])) from error
        if keep_bugs and not isinstance(error, OSError):
            raise
        raise InputError(f"{where}: {' '.join(str(error).split()) or type(error).__name__:.400}") from error


def check_installed(runner: str) -> None:
    """Raise MissingInputError if Apache Beam is not installed."""
    if importlib.util.find_spec("apache_beam") is None:
        raise MissingInputError(f"runner is {runner}, which needs Apache Beam; install it: pip install 'slm-jax[beam]'")


def check_new_url(out: str, overwrite: bool) -> None:
    """Raise InputError if a token file exists, or if its file system cannot be used."""
    from apache_beam.io.filesystems import FileSystems

    if not out.endswith(".bin"):
        raise InputError(f"out is {out!r}; expected a file FILE.bin, such as gs://BUCKET/tokens.bin")
    with _in_one_line(out):
        exists = FileSystems.exists(f"{out}.json")
    if exists and not overwrite:
        raise InputError(f"{out}.json: exists; choose another --out, or add --overwrite true")


def make_pipeline(runner: str, options: Sequence[str]) -> Any:
    """Return an empty pipeline of a runner; InputError: Beam refuses an option, or a library is missing."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    try:
        if runner == "direct":  # Beam's default may be a program that it downloads
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
    folder: str,
    tokenizer: Tokenizer,
    text_column: str | None = None,
    rules: Rules = DEFAULT_RULES,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Add all steps to a pipeline; arguments as in `prepare`, and a ``folder`` for shards before they are renamed."""
    import apache_beam as beam
    from apache_beam.pvalue import AsDict, AsList, AsSingleton

    job = Job(" ".join(map(str, sources)), rules, tokenizer)
    itemsize = token_dtype(tokenizer.vocab_size).itemsize
    found = (
        pipeline
        | "files" >> beam.Create(list(enumerate(units_of(sources))))
        | "spread files" >> beam.Reshuffle()
        | "read and filter" >> beam.FlatMap(_read, text_column, rules)
    )
    counts = found | "count reasons" >> beam.combiners.Count.PerKey()
    kept = found | "kept" >> beam.Filter(lambda each: each[0] == KEPT) | "documents" >> beam.Values()
    long = found | "too long to filter" >> beam.Filter(lambda each: each[0] == "unfiltered") | "long" >> beam.Values()
    distinct = _drop_copies(kept) if rules.deduplicate else kept
    different = distinct if rules.near_duplicates is None else _drop_near_duplicates(distinct, rules.near_duplicates)
    encoded = (different, long) | "all documents" >> beam.Flatten() | "encode" >> beam.Map(encode, job)
    n_bytes = encoded | "lengths" >> beam.Map(lambda each: len(each[1])) | "sum" >> beam.CombineGlobally(sum)
    first = encoded | "places" >> beam.Map(lambda each: each[0]) | "first" >> beam.combiners.Top.Smallest(1)
    shards = (
        encoded
        | "to shards" >> beam.Map(to_shard, AsSingleton(n_bytes), shard_tokens * itemsize)
        | "shuffle" >> beam.GroupByKey()
        | "write" >> beam.Map(write_shard, folder, itemsize, AsSingleton(first))
    )
    n_left = [
        AsSingleton(documents | f"count {what}" >> beam.combiners.Count.Globally())
        for what, documents in (("distinct", distinct), ("different", different))
    ]
    (
        pipeline
        | "once" >> beam.Create([job])
        | "index" >> beam.Map(write_index, out, AsList(shards), AsDict(counts), *n_left)
    )


# Read


def units_of(sources: Sequence[Source]) -> list[str]:
    """Return sources that one worker each can read, in order: files, and ranges of data sets."""
    units: list[str] = []
    for source in sources:
        if is_url(source.name):
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

    with _in_one_line(pattern):
        found = sorted(file.path for match in FileSystems.match([pattern]) for file in match.metadata_list)
    if not found:
        raise MissingInputError(f"{pattern}: no file matches; quote patterns")
    return found


def _ranges(source: Any) -> list[str]:
    name, _, split = source.name.partition(":")
    split = split or source.split
    if split not in source.builder.info.splits or "[" in split:  # a part, several, or none: an error when read
        return [f"tfds:{name}:{split}"]
    n_rows = source.builder.info.splits[split].num_examples
    return [f"tfds:{name}:{split}[{i}:{min(n_rows, i + TFDS_ROWS)}]" for i in range(0, n_rows, TFDS_ROWS)]


def _read(unit: tuple[int, str], text_column: str | None, rules: Rules) -> Iterator[tuple[str, Document]]:
    """Yield pairs of the reason to leave a document out, or `KEPT`, and the document, which is empty if left out."""
    place = unit[0] << 40  # number of the first document; no file has a trillion
    empty: list[tuple[str, Document]] = []
    long: list[str] = []  # the pieces of a document that is too long to be filtered
    with _local(unit[1]) as source:
        documents = source.documents(
            text_column, on_empty=lambda: empty.append(("empty", (place, ""))), may_be_empty=True
        )
        for text in mark_copies(documents, dataclasses.replace(rules, deduplicate=False)):
            if long and text.is_start:
                yield "unfiltered", (place, "".join(long))
                place, long = place + 1, []
            if text.is_whole:
                reason = rules.reason(text)
                yield reason or KEPT, (place, "" if reason else text.text)
                place += 1
            else:
                long.append(text.text)
    if long:
        yield "unfiltered", (place, "".join(long))
    yield from empty


@contextmanager
def _local(name: str) -> Iterator[Source]:
    """Yield the source; a file in another file system is first copied to this machine."""
    scheme, _, path = name.partition(":")
    if not is_url(path):
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


# Copies


def _drop_copies(documents: Any) -> Any:
    """Keep the first of equal documents."""
    import apache_beam as beam

    return (
        documents
        | "digest" >> beam.WithKeys(lambda document: digest(document[1]))
        | "first copy" >> beam.CombinePerKey(min)
        | "distinct" >> beam.Values()
    )


def _drop_near_duplicates(documents: Any, threshold: float) -> Any:
    """Leave out what `find_near_duplicates` finds; until the last step, only numbers and signatures are exchanged."""
    import apache_beam as beam

    signatures = documents | "signatures" >> beam.MapTuple(lambda number, text: (number, signature(text).tobytes()))
    pairs = (
        signatures
        | "bands" >> beam.FlatMap(_bands)
        | "equal bands" >> beam.GroupByKey()
        | "later and first" >> beam.FlatMap(_pairs)
    )
    signed = (
        {"of": signatures, "first": pairs}
        | "signatures of the later" >> beam.CoGroupByKey()
        | "to the first" >> beam.FlatMap(_to_first)
    )
    found = (
        {"of": signatures, "later": signed}
        | "signatures of the first" >> beam.CoGroupByKey()
        | "compare" >> beam.FlatMap(_compare, threshold)
    )
    return (
        {"text": documents, "found": found}
        | "documents and near duplicates" >> beam.CoGroupByKey()
        | "different" >> beam.FlatMap(_not_found)
    )


def _bands(signed: tuple[int, bytes]) -> Iterator[tuple[tuple[int, int], int]]:
    number, data = signed
    keys = band_keys(np.frombuffer(data, np.uint32).reshape(BANDS, ROWS), 0)  # a key per band
    return ((band_key, number) for band_key in enumerate(keys.view(np.int64).tolist()))


def _pairs(group: tuple[Any, Iterable[int]]) -> Iterator[tuple[int, int]]:
    first = min(group[1])
    return ((number, first) for number in group[1] if number != first)


def _to_first(group: tuple[int, dict[str, Any]]) -> Iterator[tuple[int, tuple[int, bytes]]]:
    number, found = group
    return ((first, (number, signed)) for first in set(found["first"]) for signed in found["of"])


def _compare(group: tuple[int, dict[str, Any]], threshold: float) -> Iterator[tuple[int, bool]]:
    for first in group[1]["of"]:
        for number, signed in group[1]["later"]:
            if are_similar(_array(first), _array(signed), threshold)[0]:
                yield number, True


def _array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint32)[None]


def _not_found(group: tuple[int, dict[str, Any]]) -> Iterator[Document]:
    number, found = group
    return ((number, text) for text in found["text"] if not any(found["found"]))
