"""The registry of sources: one class for each scheme of ``SCHEME:NAME``.

To add a source, write a subclass of `Source` in a module of its own and add it to `SOURCES`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from slm_jax.data.builtin import BUILTINS, Builtin
from slm_jax.data.file_sources import Csv, Json, JsonLines, Parquet, TextFiles, Tsv
from slm_jax.data.named import NAMED_FILES, Named
from slm_jax.data.rows import Source, did_you_mean
from slm_jax.data.tfds import TensorFlowDataset
from slm_jax.data.token_file import TokenSource
from slm_jax.errors import InputError

_CLASSES: tuple[type[Source], ...] = (
    *(Builtin, TextFiles, Named, JsonLines, Json, Csv, Tsv, Parquet),
    *(TensorFlowDataset, TokenSource),
)
SOURCES = {source.scheme: source for source in _CLASSES}


def parse_source(source: str, *, header: Sequence[str] = (), split: str = "train") -> Source:
    """Return the source that a string such as ``text:books/*.txt`` names, without reading it.

    ``header`` and ``split``: see `Source`. InputError: a missing or unknown scheme, an empty or unknown name.
    """
    scheme, colon, name = source.partition(":")
    forms = ", ".join(known.form for known in SOURCES.values())
    if not colon or len(scheme) == 1:  # a bare path; one letter is a Windows drive
        hint = f" (did you mean {_guess_scheme(source)}:{source}?)" if source.strip() else ""
        raise InputError(f"source {source!r} has no scheme{hint}; expected one of {forms}")
    if scheme not in SOURCES:
        hint = did_you_mean(scheme.lower(), SOURCES)
        raise InputError(f"source {source!r}: unknown scheme {scheme!r}{hint}; expected one of {forms}")
    if not name.strip():
        raise InputError(f"source {source!r} has no name; expected {SOURCES[scheme].form}")
    return SOURCES[scheme](name, header=header, split=split)


def check_text_column(column: str | None, sources: Iterable[Source], key: str = "text_column") -> None:
    """Raise InputError if a column is set (by the key ``key``) but no source has columns."""
    sources = list(sources)
    if column is not None and not any(source.has_rows for source in sources):
        raise InputError(f"{key} is {column!r}, but {' '.join(map(str, sources))} has no columns; expected null")


def _guess_scheme(bare: str) -> str:
    if bare in NAMED_FILES or bare in BUILTINS:
        return "named" if bare in NAMED_FILES else "builtin"
    path = bare.lower().removesuffix(".gz").removesuffix(".zst")
    ending = "tokens" if path.endswith(".bin") else Path(path).suffix[1:]
    return ending if ending in SOURCES else "text"
