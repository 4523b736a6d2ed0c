"""``slm-jax prepare``: any source of text becomes a file of token ids, once."""

import dataclasses
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from slm_jax.config import NotNegative, Positive, parse
from slm_jax.errors import InputError
from slm_jax.files import check_new_file

if TYPE_CHECKING:
    from rich.console import Console

    from slm_jax.data.filters import Rules
    from slm_jax.data.prepare import Prepared
    from slm_jax.tokenizer import Tokenizer

PLAIN_INTERVAL = 5.0  # seconds between two lines where there is no terminal
_VOCAB_SIZE = 4_096


@dataclasses.dataclass(frozen=True)
class Options:
    """Make a file of token ids of any text, once, however large; training takes it as --data.source tokens:FILE.bin.

    Attributes:
        source: the text: text:GLOB, jsonl:GLOB (both also .gz and .zst), parquet:GLOB, tfds:NAME[/CONFIG][:SPLIT],
            named:NAME or builtin:python-docs; given several times, one after the other.
        out: the file to write, FILE.bin: ids of 2 bytes, or 4 if the vocabulary needs them; FILE.bin.json beside it
            says what they are.
        overwrite: whether to replace a file that is there.
        text_column: the column of the texts in jsonl:, parquet: and tfds: sources; null: text, or in tfds:, where there
            is none, the only feature that is text.
        tokenizer: gpt2, bpe (trained on the first 100 million characters of the source), or a saved one: its file or
            folder, or a run's folder.
        vocab_size: how many tokens a trained bpe has, up to a million; null: 4096.
        deduplicate: whether a document that is a copy of an earlier one is left out (about 100 bytes of memory each);
            like the limits below not asked of documents over 16 million characters, which are always kept.
        min_characters: shorter documents are left out.
        max_symbol_ratio: documents of which a larger share of characters is neither letter nor digit nor white space
            are left out, such as 0.3; null: none.
        max_repeated_lines: documents of which a larger share of lines was there before are left out, such as 0.3;
            null: none.
        show: how many batches to print at the end, as the model will see them.
        context_length: tokens of a row that is shown.
        packing: whether rows are shown as with --data.packing true.
    """

    source: tuple[str, ...]
    out: str
    overwrite: bool = False
    text_column: str | None = None
    tokenizer: str = "gpt2"
    vocab_size: Annotated[int, Ge(257), Le(1_000_000)] | None = None
    deduplicate: bool = True
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


def main(args: Sequence[str]) -> int:
    """Read the options and run; see ``slm-jax prepare --help``."""
    return run(parse(Options, args, "slm-jax prepare"))


def run(options: Options) -> int:
    """Write the file and say what is in it; return 0, or 128 and the number of the signal that stopped it."""
    with _Stop() as stop:
        try:
            return _run(options, stop)
        except KeyboardInterrupt:
            return 128 + (stop.signum or signal.SIGINT)


def _run(options: Options, stop: "_Stop") -> int:
    from rich.console import Console

    from slm_jax.data.documents import source_bytes
    from slm_jax.data.filters import Rules
    from slm_jax.data.prepare import prepare
    from slm_jax.data.sources import check_text_column

    check_text_column(options.text_column, options.source)
    out = _check_out(options)
    sizes = [source_bytes(source) for source in options.source]
    total = None if None in sizes else sum(filter(None, sizes))
    rules = Rules(options.deduplicate, options.min_characters, options.max_symbol_ratio, options.max_repeated_lines)
    progress_console = Console(stderr=True)
    tokenizer = _tokenizer(options, progress_console, stop)
    with _Display(progress_console, total, stop) as display:
        prepared = prepare(
            options.source, out, tokenizer, text_column=options.text_column, rules=rules, report=display.report
        )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    _print_summary(console, options, prepared, rules)
    if options.show:
        from slm_jax.data.show import show_batches
        from slm_jax.data.token_file import map_ids, token_dtype

        show_batches(
            map_ids(out, token_dtype(tokenizer.vocab_size)),
            tokenizer,
            n=options.show,
            context_length=options.context_length,
            packing=options.packing,
            console=console,
        )
    console.print(f"try next: slm-jax train --data.source {shlex.quote(f'tokens:{options.out}')}")
    return 0


class _Lines:
    """Prints a line now and then."""

    def __init__(self, console: "Console") -> None:
        self._console, self._last = console, time.monotonic()

    def say(self, text: str) -> None:
        if time.monotonic() - self._last >= PLAIN_INTERVAL:
            self._last = time.monotonic()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Display:
    """A bar in a terminal, a line now and then elsewhere; asks at each report whether to stop."""

    def __init__(self, console: "Console", total_bytes: int | None, stop: "_Stop") -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._console, self._total, self._stop = console, total_bytes, stop
        self._start, self._lines = time.monotonic(), _Lines(console)
        bar = (BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn()) if total_bytes else ()
        self._live = Progress(*bar, TextColumn("{task.description}"), console=console, disable=not console.is_terminal)
        self._task = self._live.add_task("reading", total=total_bytes)

    def __enter__(self) -> "_Display":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def report(self, progress: "Prepared") -> None:
        self._stop.check()
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = f"{progress.tokens / seconds:,.0f} tokens/s"
        text = f"{_documents(progress.documents)} · {progress.tokens:,} tokens · {rate}"
        if self._console.is_terminal:
            self._live.update(self._task, completed=progress.bytes_read, description=text)
        else:
            self._lines.say((f"{progress.bytes_read / self._total:.0%} · " if self._total else "") + text)


def _check_out(options: Options) -> Path:
    """Refuse a file that cannot be written, or must not be, before anything is read."""
    from slm_jax.data.documents import source_files
    from slm_jax.data.token_file import json_path

    out = check_new_file(options.out, "out", "tokens.bin").resolve()
    if out.suffix != ".bin":
        raise InputError(f"out is {options.out!r}; expected a file FILE.bin, such as tokens.bin")
    there = [path for path in (out, json_path(out)) if path.exists()]
    for source in options.source:
        for file in source_files(source) or ():
            if any(file.exists() and file.samefile(path) for path in there):
                raise InputError(f"{file}: is to be read for {source} and would be replaced; choose another --out")
    if there and not options.overwrite:
        raise InputError(f"{there[0]}: is there already; choose another --out, or add --overwrite true")
    return out


def _tokenizer(options: Options, console: "Console", stop: "_Stop") -> "Tokenizer":
    from slm_jax.data.prepare import train_tokenizer
    from slm_jax.tokenizer import get_tokenizer

    if options.tokenizer != "bpe":
        return get_tokenizer(options.tokenizer)
    vocab_size = options.vocab_size or _VOCAB_SIZE
    console.print(f"training a tokenizer of {vocab_size:,} tokens on the start of the text", highlight=False)
    lines = _Lines(console)
    with stop.at_once():
        return train_tokenizer(
            options.source, vocab_size, options.text_column, lambda n: lines.say(f"{n:,} characters read")
        )


def _print_summary(console: "Console", options: Options, prepared: "Prepared", rules: "Rules") -> None:
    from slm_jax.training.progress import format_bytes, format_duration

    rate = prepared.tokens / max(prepared.seconds, 1e-9)
    console.print(f"{options.out} written, SHA-256 {prepared.sha256[:12]}…, and {options.out}.json")
    console.print(
        f"  {_documents(prepared.documents)}, {prepared.tokens:,} tokens, {format_bytes(prepared.text_bytes)} of text, "
        f"in {format_duration(prepared.seconds)} ({rate:,.0f} tokens/s)"
    )
    for reason, text in _LEFT_OUT.items():
        if prepared.counts[reason] or _applies(rules, reason):
            console.print(f"  {prepared.counts[reason]:,} {text}")


def _documents(n: int) -> str:
    return f"{n:,} document{'' if n == 1 else 's'}"


_LEFT_OUT = {
    "empty": "left out: rows or files without text",
    "duplicates": "left out: copies of an earlier document",
    "short": "left out: fewer characters than min_characters",
    "symbols": "left out: more symbols than max_symbol_ratio",
    "repeated_lines": "left out: more repeated lines than max_repeated_lines",
    "unfiltered": "kept without a look: longer than 16 million characters",
}


def _applies(rules: "Rules", reason: str) -> bool:
    return {
        "duplicates": rules.deduplicate,
        "short": rules.min_characters > 0,
        "symbols": rules.max_symbol_ratio is not None,
        "repeated_lines": rules.max_repeated_lines is not None,
    }.get(reason, False)


class _Stop:
    """SIGINT and SIGTERM as a KeyboardInterrupt, so that nothing half made is left.

    Attributes:
        signum: of the first signal that came.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raise it again: in a callback of the garbage collector, of which JAX has one, Python drops exceptions."""
        if self.signum is not None:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the process: while other code than Python's is at work, nothing else would; not to be used
        where something is being written.
        """
        self.check()
        for signum in self._previous:
            signal.signal(signum, signal.SIG_DFL)
        try:
            yield
        finally:
            for signum in self._previous:
                signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        raise KeyboardInterrupt
