"""Where text and token ids come from: `KIND:REST`, and the files that a pattern means."""

import difflib
import glob
from collections.abc import Iterable, Mapping
from pathlib import Path

from slm_jax.data.named import NAMED_FILES
from slm_jax.data.text_files import unreadable
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import user_path

KINDS = {
    "builtin": "builtin:python-docs",
    "text": "text:GLOB",
    "named": "named:NAME",
    "jsonl": "jsonl:GLOB",
    "parquet": "parquet:GLOB",
    "tfds": "tfds:NAME[/CONFIG][:SPLIT]",
    "tokens": "tokens:FILE.bin",
}
WITH_COLUMNS = ("jsonl", "parquet", "tfds")


def parse_source(source: str, kinds: Mapping[str, str] = KINDS) -> tuple[str, str]:
    """Split "text:books/*.txt" into ("text", "books/*.txt").

    Args:
        source: what the user gave.
        kinds: the kinds that are accepted, each with its form, such as "text:GLOB".

    Raises:
        InputError: no kind, or another, or nothing behind it.
    """
    accepted = ", ".join(kinds.values())
    kind, colon, rest = source.partition(":")
    if not colon or len(kind) == 1:  # a bare path; one letter is a Windows drive
        raise InputError(f"source {source!r} has no kind{_suggest_kind(source, kinds)}; expected {accepted}")
    if kind not in kinds:
        near = difflib.get_close_matches(kind.lower(), kinds, n=1, cutoff=0.7)
        hint = f" (did you mean {near[0]}:{rest}?)" if near else ""
        raise InputError(f"source {source!r}: no kind {kind!r} here{hint}; expected {accepted}")
    if not rest.strip():
        raise InputError(f"source {source!r} says only the kind; expected {kinds[kind]}")
    return kind, rest


def is_token_source(source: str) -> bool:
    """Whether a source holds token ids rather than text."""
    return parse_source(source)[0] == "tokens"


def check_text_column(column: str | None, sources: Iterable[str], key: str = "text_column") -> None:
    """Check a column, which the user set as ``key``.

    Raises:
        InputError: a column where no source has any.
    """
    sources = list(sources)
    if column is not None and not any(parse_source(source)[0] in WITH_COLUMNS for source in sources):
        raise InputError(f"{key} is {column!r}, but {' '.join(sources)} has no columns; leave it out")


def _suggest_kind(bare: str, kinds: Mapping[str, str]) -> str:
    known = "named" if bare in NAMED_FILES else "builtin" if f"builtin:{bare}" in kinds.values() else ""
    name = bare.lower().removesuffix(".gz").removesuffix(".zst")
    ending = "tokens" if name.endswith(".bin") else Path(name).suffix[1:]
    near = [kind for kind in (known, ending, "text") if kind in kinds]
    return f" (did you mean {near[0]}:{bare}?)" if near and bare.strip() else ""


def matching_files(pattern: str) -> list[Path]:
    """Return the files that a path or pattern means, sorted; ``~`` and ``**`` work, and folders are left out.

    Raises:
        InputError: a folder, or one on the way that cannot be read.
        MissingInputError: nothing that matches.
    """
    literal = user_path(pattern)
    try:
        if literal.is_dir():
            raise InputError(f"{literal} is a folder, expected files, such as text:{literal / '**' / '*.txt'}")
        if literal.exists():  # before any globbing: a name may contain brackets
            return [literal]
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long
        raise unreadable(literal, error) from error
    if not glob.has_magic(pattern):
        raise MissingInputError(f"{literal}: no such file (looked from {Path.cwd()}); check the path, or use text:GLOB")
    found = glob.glob(str(literal), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    files = [path for path in sorted(map(Path, found)) if not path.is_dir()]
    if not files:
        raise MissingInputError(
            f"{literal}: no file matches (looked from {Path.cwd()}); check the pattern, "
            "and quote it so that the shell leaves it alone"
        )
    return files
