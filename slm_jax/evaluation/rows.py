"""The examples of a benchmark, from a JSON Lines file or TensorFlow Datasets."""

from slm_jax.data.rows import Row, read_jsonl, read_tfds
from slm_jax.errors import InputError
from slm_jax.files import user_path

# What TensorFlow Datasets has of a benchmark: the split that is scored, and the fields it calls otherwise.
_TFDS = {
    "lambada": ("test", {"passage": "text"}),
    "hellaswag": ("validation", {"context": "ctx"}),
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
        rows = read_jsonl(user_path(rest), limit)
    elif kind == "tfds" and rest.partition(":")[0] == benchmark:
        rows = _read_benchmark(benchmark, rest.partition(":")[2], limit)
    else:
        raise InputError(
            f"source {source!r} is no source of {benchmark} examples; "
            f"expected jsonl:FILE, tfds:{benchmark} or tfds:{benchmark}:SPLIT"
        )
    if not rows:
        raise InputError(f"{source}: empty; expected at least one example")
    return rows


def _read_benchmark(benchmark: str, split: str, limit: int | None) -> list[Row]:
    default_split, renamed = _TFDS[benchmark]
    rows = read_tfds(benchmark, split or default_split, limit)
    return [Row(row.where, {renamed.get(name, name): value for name, value in row.fields.items()}) for row in rows]
