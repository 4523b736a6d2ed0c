"""Instructions with responses: from where they are to three splits."""

import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_jax.config import DataConfig, InstructionConfig
from slm_jax.data.builtin_instructions import docstring_entries
from slm_jax.data.named import NAMED_FILES, named_file
from slm_jax.data.rows import Row, read_json, read_jsonl, read_tfds
from slm_jax.errors import InputError
from slm_jax.files import user_path
from slm_jax.templates import Message, entry_messages

SOURCES = {
    "json": "json:FILE",
    "jsonl": "jsonl:FILE",
    "tfds": "tfds:NAME (such as tfds:databricks_dolly)",
    "named": "named:instruction-data",
    "builtin": "builtin:docstrings",
}


Prompt = tuple[Message, ...]


class Example(NamedTuple):
    """A conversation, the last message of which, the assistant's, is the response; and where it stands."""

    where: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> Prompt:
        """What the response answers."""
        return self.messages[:-1]


class InstructionSplits(NamedTuple):
    """The examples of each split, and what there is to say about how they came about, a line each."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]


def load_instructions(data: DataConfig, cfg: InstructionConfig, seed: int) -> InstructionSplits:
    """Read and split the examples of ``data``.

    An entry is Alpaca's (``instruction``, ``output``, and perhaps ``input``), Dolly's (``instruction``, ``response``,
    ``context``), or a chat (``messages``, each with ``role`` and ``content``, the last the assistant's).

    One source is split by ``data``'s fractions, each count rounded down and the rest going to validation.
    In ``file_order`` training comes first, then test, then validation. At random, examples with the same prompt go
    to the same split.

    Args:
        data: the sources and fractions.
        cfg: says in which order the examples are split.
        seed: of the random order.

    Raises:
        InputError: a source, file or entry that is no such thing; a split without examples; a prompt of one given
            split that is also in another.
    """
    examples = read_examples(data.source)
    notes = []
    if cfg.split == "random":
        groups = _by_prompt([examples[i] for i in np.random.default_rng(seed).permutation(len(examples))])
        splits = _bring_together(_cut(list(itertools.chain(*groups)), data))
        if n_repeated := len(examples) - len(groups):
            notes.append(f"{n_repeated:,} of them repeat the prompt of another, and are in the same split as that")
    else:
        splits = _cut(examples, data)
        if n_shared := _count_shared(splits):
            notes.append(f"{n_shared:,} of them repeat the prompt of one in another split, as the file's order decides")
    given = [name for name in ("validation", "test") if getattr(data, f"{name}_source")]
    for name in given:
        splits[name] = read_examples(getattr(data, f"{name}_source"))
    _check_apart(splits, given)
    for name, split in splits.items():
        if not split:
            raise InputError(
                f"the {name} split gets none of the {len(examples)} examples of {data.source}; expected at least one: "
                "give more, or change data.validation_fraction or data.test_fraction"
            )
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    train, validation, test = (tuple(splits[name]) for name in ("train", "validation", "test"))
    return InstructionSplits(train, validation, test, (f"examples: {sizes}", *notes))


# Reading


def read_examples(source: str) -> list[Example]:
    """Read all examples of one source, in its order.

    Raises:
        InputError: a source, file or entry that is no such thing.
    """
    examples = [_example(row) for row in _read_rows(source)]
    if not examples:
        raise InputError(f"{source}: empty; expected at least one example")
    return examples


def _read_rows(source: str) -> list[Row]:
    kind, colon, rest = source.partition(":")
    if not colon or kind not in SOURCES or not rest.strip():
        written = kind.lower() if colon else Path(kind).suffix[1:]
        near = difflib.get_close_matches(written, SOURCES, n=1)
        hint = f" (did you mean {near[0]}:{rest or kind}?)" if near and near[0] != kind else ""
        expected = ", ".join(SOURCES.values())
        raise InputError(f"source {source!r} is no source of instructions{hint}; expected {expected}")
    if kind == "builtin":
        if rest != "docstrings":
            raise InputError(f"source {source!r}: no instructions of that name; expected builtin:docstrings")
        return [Row(f"{source} entry {i}", dict(entry)) for i, entry in enumerate(docstring_entries(), start=1)]
    if kind == "tfds":
        name, _, split = rest.partition(":")
        return read_tfds(name, split or "train")
    if kind == "named" and rest != "instruction-data":
        what = "holds no instructions" if rest in NAMED_FILES else "no such name"
        raise InputError(f"source {source!r}: {what}; expected named:instruction-data")
    if kind == "jsonl":
        return read_jsonl(user_path(rest))
    return read_json(named_file(rest) if kind == "named" else user_path(rest))


def _example(row: Row) -> Example:
    messages = entry_messages(row.fields, row.where)
    if messages[-1].role != "assistant":
        if "messages" in row.fields:
            raise InputError(f"{row.where}: the last message is of role {messages[-1].role}; expected the assistant's")
        row.field("output")  # is missing
    return Example(row.where, messages)


# Splitting


def _cut(examples: list[Example], data: DataConfig) -> dict[str, list[Example]]:
    """Cut the examples in three parts; none for a split that has its own source."""
    n = len(examples)
    validation = 0.0 if data.validation_source else data.validation_fraction
    test = 0.0 if data.test_source else data.test_fraction
    if validation + test >= 1:
        raise InputError(
            f"data.validation_fraction {validation} and data.test_fraction {test} leave nothing to train on; "
            "expected a sum below 1"
        )
    n_test = _share(n, test)
    n_train = _share(n, 1 - validation - test) if validation else n - n_test
    return {
        "train": examples[:n_train],
        "validation": examples[n_train + n_test :],
        "test": examples[n_train : n_train + n_test],
    }


def _share(n: int, fraction: float) -> int:
    return int(round(n * fraction, 6))  # a fraction such as 1 - 0.1 - 0.2 is a little off


def _by_prompt(examples: Sequence[Example]) -> list[list[Example]]:
    """Put examples with the same prompt together, at the place of the first."""
    groups: dict[Prompt, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example)
    return list(groups.values())


def _first_split(splits: dict[str, list[Example]]) -> dict[Prompt, str]:
    first: dict[Prompt, str] = {}
    for name, split in splits.items():
        for example in split:
            first.setdefault(example.prompt, name)
    return first


def _count_shared(splits: dict[str, list[Example]]) -> int:
    first = _first_split(splits)
    return sum(first[example.prompt] != name for name, split in splits.items() for example in split)


def _bring_together(splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """Move each example to the first split that has its prompt."""
    first = _first_split(splits)
    together: dict[str, list[Example]] = {name: [] for name in splits}
    for example in itertools.chain(*splits.values()):
        together[first[example.prompt]].append(example)
    return together


def _check_apart(splits: dict[str, list[Example]], given: Sequence[str]) -> None:
    """Refuse a prompt of a given split that is in another split, too."""
    first: dict[Prompt, tuple[str, str]] = {}
    shared = []
    for name, split in splits.items():
        for example in split:
            other, where = first.setdefault(example.prompt, (name, example.where))
            if other != name and (name in given or other in given):
                shared.append(f"{example.where} ({name}) has the same prompt as {where} ({other})")
    if shared:
        more = f" ({len(shared):,} such in all)" if len(shared) > 1 else ""
        raise InputError(f"{shared[0]}{more}; expected no prompt in two splits: take it out of one")
