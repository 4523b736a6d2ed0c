"""The examples of a benchmark, from a JSON Lines file or TensorFlow Datasets."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.errors import InputError, MissingInputError
from slm_jax.network import check_reachable

CONNECT_SECONDS = 4.0  # offline, TensorFlow Datasets itself would try for minutes


class Row(NamedTuple):
    """One example: its fields, and where it stands, for messages."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """Return a field that must be text."""
        value = self.field(name)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {name} is {value!r:.60}; expected text")
        return value

    def field(self, name: str) -> Any:
        """Return a field that must be there."""
        if name not in self.fields:
            raise InputError(f"{self.where}: no field {name!r} but {', '.join(self.fields) or 'none'}; add it")
        return self.fields[name]


class _Dataset(NamedTuple):
    """What TensorFlow Datasets calls a benchmark, and where it downloads it from."""

    default_split: str
    url: str
    renamed: dict[str, str]


_DATASETS = {
    "lambada": _Dataset("test", "https://zenodo.org", {"passage": "text"}),
    "hellaswag": _Dataset("validation", "https://raw.githubusercontent.com", {"context": "ctx"}),
}


def read_rows(source: str, benchmark: str, limit: int | None) -> list[Row]:
    """Read the first ``limit`` examples (all, if None) of ``jsonl:FILE`` or ``tfds:NAME[:SPLIT]``.

    Args:
        source: a file with one JSON object a line, or ``benchmark`` as TensorFlow Datasets has it, downloaded once.
        benchmark: ``lambada`` or ``hellaswag``.
        limit: at least 1.

    Raises:
        InputError: a source of another kind; a file, line or download that cannot be read; no examples.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 example, or none for all")
    kind, _, rest = source.partition(":")
    if kind == "jsonl" and rest:
        rows = _read_jsonl(Path(rest).expanduser(), limit)
    elif kind == "tfds" and rest.partition(":")[0] == benchmark:
        rows = _read_tfds(benchmark, rest.partition(":")[2], limit)
    else:
        raise InputError(
            f"source {source!r} is no source of {benchmark} examples; "
            f"expected jsonl:FILE, tfds:{benchmark} or tfds:{benchmark}:SPLIT"
        )
    if not rows:
        raise InputError(f"{source}: empty; expected at least one example")
    return rows


def _read_jsonl(path: Path, limit: int | None) -> list[Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file (looked from {Path.cwd()}); check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; expected a JSON Lines file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; expected a JSON Lines file") from None
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut at U+2028 inside a string, too
        if line.strip():
            rows.append(_parse(f"{path} line {number}", line))
        if len(rows) == limit:
            break
    return rows


def _parse(where: str, line: str) -> Row:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
        raise InputError(f"{where}: not JSON ({problem}): {line!r:.60}; expected one JSON object a line") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        raise InputError(f"{where}: JSON that cannot be read ({error}); expected one JSON object a line") from None
    if not isinstance(fields, dict):
        raise InputError(f"{where}: {line!r:.60} is no JSON object; expected one a line")
    return Row(where, fields)


def _read_tfds(benchmark: str, split: str, limit: int | None) -> list[Row]:
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text.hellaswag  # registers it

    dataset = _DATASETS[benchmark]
    split = split or dataset.default_split
    try:
        # Array records are what can be read without TensorFlow.
        builder = tfds.builder(benchmark, file_format="array_record", data_dir=os.environ.get("TFDS_DATA_DIR"))
        if not (builder.data_path / "dataset_info.json").exists():
            check_reachable(dataset.url, CONNECT_SECONDS)
            builder.download_and_prepare()
        examples = builder.as_data_source(split)
    except Exception as error:  # its errors have no narrower base
        raise MissingInputError(
            f"tfds:{benchmark}:{split}: {' '.join(str(error).split())}; expected it as array records in TFDS_DATA_DIR "
            f"(default ~/tensorflow_datasets), or a way to download it from {dataset.url}; or use jsonl:FILE"
        ) from error
    n = len(examples) if limit is None else min(limit, len(examples))
    return [
        Row(
            f"tfds:{benchmark}:{split} example {i}",
            {dataset.renamed.get(name, name): _decoded(value) for name, value in examples[i].items()},
        )
        for i in range(n)
    ]


def _decoded(value: Any) -> Any:
    """Turn what TensorFlow Datasets gives into what JSON would: text is bytes there, and a number NumPy's."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list | np.ndarray):
        return [_decoded(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
