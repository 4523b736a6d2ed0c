"""``slm-jax prepare``: encode a source of text into a file of token ids, once."""

import dataclasses
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from slm_jax.commands import stdout_console
from slm_jax.config import NotNegative, Positive
from slm_jax.data.beam import SHARD_TOKENS, check_installed, check_new_url
from slm_jax.data.beam import prepare as prepare_with_beam
from slm_jax.data.filters import NormalForm, Rules
from slm_jax.data.prepare import Prepared, prepare, train_tokenizer, work_folder
from slm_jax.data.rows import Source
from slm_jax.data.sources import check_text_column, parse_source
from slm_jax.data.token_file import existing_paths, open_token_file
from slm_jax.errors import InputError
from slm_jax.files import check_new_file, is_url
from slm_jax.tokenizer import Tokenizer, get_tokenizer

PLAIN_INTERVAL = 5.0  # seconds between two progress lines without a terminal
_VOCAB_SIZE = 4_096


@dataclasses.dataclass(frozen=True)
class Options:
    """Encode text of any size into a file of token ids, once; train with it: --data.source tokens:FILE.bin.

    Attributes:
        source: the text: text:GLOB, jsonl:GLOB (both also .gz and .zst), parquet:GLOB, tfds:NAME[/CONFIG][:SPLIT],
            named:NAME, builtin:python-docs or any other source of rows; several are read one after the other.
        out: the file to write, FILE.bin: ids of 2 bytes, or 4 if the vocabulary needs them; FILE.bin.json beside it
            describes them. Until both are there, FILE.bin.parts holds what is done: after a kill or Ctrl-C, the same
            command resumes from it.
        overwrite: whether to replace an existing file.
        shard_tokens: token ids per shard: files FILE-00000.bin, FILE-00001.bin, … that FILE.bin.json lists and
            tokens:FILE.bin reads; null: one file.
        processes: number of processes that filter and encode; 1: threads of one process. The file is the same.
        runner: run as an Apache Beam pipeline (extra beam): direct on this machine, or dataflow, spark, flink on many.
            The documents are the same, in a random order, in shards of about shard_tokens (default: 100 million).
            Sources and out may then be URLs, such as gs://. null: without Beam.
        beam_options: Beam's own options for the runner, such as --project=NAME; repeat for each.
        text_column: column of the texts in sources of rows, such as jsonl: and parquet:; null: text, or in tfds: the
            usual name or the only text feature.
        tokenizer: gpt2, bpe (trained on the first 100 million characters of the source), or the path of a saved one:
            its file or folder, a run's folder, or the FILE.bin.json of another token file.
        vocab_size: vocabulary size of a trained bpe, up to a million; null: 4096.
        deduplicate: whether to leave out copies of an earlier document (about 100 bytes of memory per document); this
            and the limits below don't apply to documents over 16 million characters, which are always kept.
        near_duplicates: leave out documents that have about this share of their runs of four words in common with an
            earlier one, such as 0.7 (Jaccard similarity, estimated by MinHash; a kilobyte of memory per document);
            null: keep them.
        normalize: Unicode normal form of the texts: NFC (é is one character, however it was typed), or NFKC (also
            replaces full-width letters and ligatures by ordinary ones); null: unchanged.
        min_characters: leave out shorter documents.
        max_symbol_ratio: leave out documents with a larger share of characters that are neither letters nor digits nor
            white space, such as 0.3; null: keep all.
        max_repeated_lines: leave out documents with a larger share of lines that repeat an earlier line, such as 0.3;
            null: keep all.
        show: number of batches to print at the end, as the model will see them.
        context_length: tokens per row of these batches.
        packing: whether to show rows packed as with --data.packing true.
    """

    source: tuple[str, ...]
    out: str
    overwrite: bool = False
    shard_tokens: Positive | None = None
    processes: Positive = 1
    runner: Literal["direct", "dataflow", "spark", "flink"] | None = None
    beam_options: tuple[str, ...] = ()
    text_column: str | None = None
    tokenizer: str = "gpt2"
    vocab_size: Annotated[int, Ge(257), Le(1_000_000)] | None = None
    deduplicate: bool = True
    near_duplicates: Annotated[float, Gt(0), Le(1)] | None = None
    normalize: NormalForm | None = None
    min_characters: NotNegative = 0
    max_symbol_ratio: Annotated[float, Ge(0)] | None = None
    max_repeated_lines: Annotated[float, Ge(0)] | None = None
    show: NotNegative = 0
    context_length: Positive = 64
    packing: bool = False

    def __post_init__(self) -> None:
        if not self.source:
            raise InputError("--source is missing; expected the text, such as text:GLOB")
        if self.vocab_size is not None and self.tokenizer != "bpe":
            raise InputError(f"vocab_size is {self.vocab_size}, but {self.tokenizer} has its own; add --tokenizer bpe")
        if self.runner is None and self.beam_options:
            raise InputError("beam_options need Beam; add --runner, such as --runner dataflow")
        if self.runner is not None and self.processes != 1:
            raise InputError(f"processes is {self.processes}, but Beam starts its own; leave it out with --runner")
        if self.show and is_url(self.out):
            raise InputError(f"show is {self.show}, but out is {self.out}; expected a file of this machine, or show 0")


def run(options: Options) -> int:
    """Write the file and summarize it; return 0, or 128 plus the number of the signal that stopped it."""
    try:
        with _on_signal(_interrupt):
            _run(options)
        return 0
    except KeyboardInterrupt as interrupt:  # so that only finished parts are left
        if options.runner not in (None, "direct"):
            _note(f"stopped waiting; {options.runner} may continue the job")
        elif options.runner is None and work_folder(Path(options.out)).exists():
            _note("stopped; the same command resumes")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _note(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _run(options: Options) -> None:
    sources = [parse_source(text) for text in options.source]
    check_text_column(options.text_column, sources)
    local = [source for source in sources if not is_url(source.name)]
    all_are_files = all(source.files() is not None for source in local)
    files = [file for source in local for file in source.files() or ()]
    _check_places(options, sources, files)
    out = options.out
    if is_url(out):
        check_new_url(out, options.overwrite)
    else:
        out = str(_check_out(options, files))
    total = sum(file.stat().st_size for file in files) if all_are_files else None
    rules = Rules(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Rules)})
    progress_console = Console(stderr=True)
    tokenizer = _tokenizer(options, sources, progress_console)
    start = time.monotonic()
    if options.runner is not None:
        prepared = prepare_with_beam(
            sources,
            out,
            tokenizer,
            runner=options.runner,
            options=options.beam_options,
            text_column=options.text_column,
            rules=rules,
            shard_tokens=options.shard_tokens or SHARD_TOKENS,
        )
    else:
        with _progress(progress_console, total) as report:
            prepared = prepare(
                sources,
                Path(out),
                tokenizer,
                text_column=options.text_column,
                rules=rules,
                shard_tokens=options.shard_tokens,
                processes=options.processes,
                report=report,
            )
    console = stdout_console(soft_wrap=True, highlight=False, markup=False)
    _print_summary(console, options, prepared, max(time.monotonic() - start, 1e-9))
    if options.show:
        from slm_jax.data.show import show_batches

        show_batches(
            open_token_file(out, verify=False).tokens,
            tokenizer,
            n=options.show,
            context_length=options.context_length,
            packing=options.packing,
            console=console,
        )
    console.print(f"try next: slm-jax train --data.source {shlex.quote(f'tokens:{options.out}')}")


def _check_places(options: Options, sources: Sequence[Source], files: Sequence[Path]) -> None:
    """Raise InputError if sources or output are not where the runner can use them."""
    urls = [url for url in (*(source.name for source in sources), options.out) if is_url(url)]
    if options.runner is not None:
        check_installed(options.runner)
    elif urls:
        raise InputError(f"{urls[0]}: expected files of this machine; with Apache Beam URLs work: --runner dataflow")
    if options.runner == "dataflow" and (files or not is_url(options.out)):
        raise InputError(
            f"{(*files, options.out)[0]}: Dataflow's machines don't see it; expected such as gs://BUCKET/…"
        )
    if options.tokenizer == "bpe" and any(is_url(source.name) for source in sources):
        remedy = "train it on a file of this machine, then --tokenizer FILE.bin.json"
        raise InputError(f"{urls[0]}: tokenizer bpe cannot be trained on it; {remedy}")


def _check_out(options: Options, files: Sequence[Path]) -> Path:
    out = check_new_file(options.out, "out", "tokens.bin").resolve()
    if out.suffix != ".bin":
        raise InputError(f"out is {options.out!r}; expected a file FILE.bin, such as tokens.bin")
    existing = existing_paths(out)
    for file in files:
        if any(file.exists() and file.samefile(path) for path in existing):
            raise InputError(f"{file}: is read and would be replaced; choose another --out")
    if existing and not options.overwrite:
        raise InputError(f"{existing[0]}: exists; choose another --out, or add --overwrite true")
    return out


def _tokenizer(options: Options, sources: Sequence[Source], console: Console) -> Tokenizer:
    if options.tokenizer != "bpe":
        return get_tokenizer(options.tokenizer)
    vocab_size = options.vocab_size or _VOCAB_SIZE
    console.print(f"training a tokenizer of {vocab_size:,} tokens on the start of the text", highlight=False)
    print_line = _now_and_then(console)
    # Nothing is being written yet, and long native code would delay Python's signal handlers.
    with _on_signal(signal.SIG_DFL):
        return train_tokenizer(
            sources, vocab_size, options.text_column, options.normalize, lambda n: print_line(f"{n:,} characters read")
        )


def _now_and_then(console: Console) -> Callable[[str], None]:
    """Return a function that prints a line, but at most one every few seconds."""
    last = time.monotonic()

    def print_line(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_INTERVAL:
            last = time.monotonic()
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    return print_line


@contextmanager
def _progress(console: Console, total: int | None) -> Iterator[Callable[[Prepared], None]]:
    """Yield a function that reports progress (of ``total`` bytes): a bar in a terminal, else a line now and then."""
    start, print_line = time.monotonic(), _now_and_then(console)
    bar = (BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn()) if total else ()

    def report(prepared: Prepared) -> None:
        rate = prepared.tokens / max(time.monotonic() - start, 1e-9)
        text = f"{_documents(prepared)}, {prepared.tokens:,} tokens, {rate:,.0f} tokens/s"
        live.update(task, completed=prepared.bytes_read, description=text)
        if not console.is_terminal:
            print_line(f"{prepared.bytes_read / total:.0%}, {text}" if total else text)

    with Progress(*bar, TextColumn("{task.description}"), console=console, disable=not console.is_terminal) as live:
        task = live.add_task("reading", total=total)
        yield report


def _print_summary(console: Console, options: Options, prepared: Prepared, seconds: float) -> None:
    from slm_jax.training.progress import format_bytes, format_duration

    console.print(f"{options.out} written, SHA-256 {prepared.sha256[:12]}…, and {options.out}.json")
    console.print(
        f"  {_documents(prepared)}, {prepared.tokens:,} tokens, {format_bytes(prepared.text_bytes)} of text, "
        f"in {format_duration(seconds)} ({prepared.tokens / seconds:,.0f} tokens/s)"
    )
    for reason, rule, text in (  # a rule that is on is shown even if it left out nothing
        ("empty", None, "left out: rows or files without text"),
        ("duplicates", options.deduplicate or None, "left out: copies of an earlier document"),
        ("near_duplicates", options.near_duplicates, "left out: near duplicates of an earlier document"),
        ("short", options.min_characters or None, "left out: fewer characters than min_characters"),
        ("symbols", options.max_symbol_ratio, "left out: more symbols than max_symbol_ratio"),
        ("repeated_lines", options.max_repeated_lines, "left out: more repeated lines than max_repeated_lines"),
        ("unfiltered", None, "kept unfiltered: longer than 16 million characters"),
    ):
        if prepared.counts[reason] or rule is not None:
            console.print(f"  {prepared.counts[reason]:,} {text}")


def _documents(prepared: Prepared) -> str:
    return f"{prepared.documents:,} document{'' if prepared.documents == 1 else 's'}"


def _interrupt(signum: int, _frame: Any) -> None:
    raise KeyboardInterrupt(signum)


@contextmanager
def _on_signal(handler: Any) -> Iterator[None]:
    previous = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)
