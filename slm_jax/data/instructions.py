"""Instructions with responses: from where they are to three splits."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.data.builtin_instructions import docstring_entries
from slm_jax.data.config import DataConfig, InstructionConfig
from slm_jax.data.named import NAMED_FILES, named_file
from slm_jax.data.rows import Row, read_json, read_jsonl, read_tfds
from slm_jax.data.sources import parse_source
from slm_jax.data.splits import first_places, grouped, share, shared, split_fractions
from slm_jax.data.templates import Message, entry_messages
from slm_jax.errors import InputError
from slm_jax.files import user_path

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
        shuffled = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]
        groups = grouped(shuffled, map(_prompt, shuffled))
        splits = _bring_together(_cut(list(itertools.chain(*groups)), data))
        if n_repeated := len(examples) - len(groups):
            notes.append(f"{n_repeated:,} of them repeat the prompt of another, and are in the same split as that")
    else:
        splits = _cut(examples, data)
        if n_shared := len(shared(splits, _prompt)):
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
    kind, rest = parse_source(source, SOURCES)
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
        raise InputError(f"{row.where}: no field 'output' but {', '.join(row.fields):.200}; add it")
    return Example(row.where, messages)


# Splitting


def _cut(examples: list[Example], data: DataConfig) -> dict[str, list[Example]]:
    """Cut the examples in three parts; none for a split that has its own source."""
    validation, test = split_fractions(data)
    n = len(examples)
    n_test = share(n, test)
    n_train = share(n, 1 - validation - test) if validation else n - n_test
    return {
        "train": examples[:n_train],
        "validation": examples[n_train + n_test :],
        "test": examples[n_train : n_train + n_test],
    }


def _prompt(example: Example) -> Prompt:
    return example.prompt


def _bring_together(splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """Move each example to the first split that has its prompt."""
    first = first_places(splits, _prompt)
    together: dict[str, list[Example]] = {name: [] for name in splits}
    for example in itertools.chain(*splits.values()):
        together[first[example.prompt][0]].append(example)
    return together


def _check_apart(splits: dict[str, list[Example]], given: Sequence[str]) -> None:
    """Refuse a prompt of a given split that is in another split, too."""
    pairs = [(one, two) for one, two in shared(splits, _prompt) if one[0] in given or two[0] in given]
    if pairs:
        (first_name, first), (name, example) = pairs[0]
        more = f" ({len(pairs):,} such in all)" if len(pairs) > 1 else ""
        raise InputError(
            f"{example.where} ({name}) has the same prompt as {first.where} ({first_name}){more}; expected no prompt "
            "in two splits: take it out of one"
        )
