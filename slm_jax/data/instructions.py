"""Instructions with responses, from their source to three splits."""

import itertools
import operator
from typing import NamedTuple

import numpy as np

from slm_jax.data.config import DataConfig, InstructionConfig
from slm_jax.data.rows import Row
from slm_jax.data.sources import parse_source
from slm_jax.data.splits import (
    SPLITS,
    check_apart,
    first_places,
    grouped,
    require_filled,
    share,
    shared,
    split_fractions,
)
from slm_jax.data.templates import Message, entry_messages
from slm_jax.errors import InputError

Prompt = tuple[Message, ...]


class Example(NamedTuple):
    """A conversation whose last message is the assistant's response, and its place, for messages."""

    where: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> Prompt:
        """The conversation up to the response."""
        return self.messages[:-1]


_prompt = operator.attrgetter("prompt")


class InstructionSplits(NamedTuple):
    """The examples of each split, and notes on how they were split, a line each."""

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

    Raises:
        InputError: a source or entry that cannot be read; an empty split; a separate validation or test source that
            shares a prompt with another split.
    """
    examples = read_examples(data.source)
    notes = []
    if cfg.split == "random":
        shuffled = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]
        groups = grouped(shuffled, map(_prompt, shuffled))
        splits = _bring_together(_cut(list(itertools.chain(*groups)), data))
        if n_repeated := len(examples) - len(groups):
            notes.append(f"{n_repeated:,} of them repeat the prompt of another one, and are in the same split")
    else:
        splits = _cut(examples, data)
        if n_shared := len(shared(splits, _prompt)):
            notes.append(f"{n_shared:,} of them repeat the prompt of one in another split (split: file_order)")
    separate = [name for name in ("validation", "test") if getattr(data, f"{name}_source")]
    for name in separate:
        splits[name] = read_examples(getattr(data, f"{name}_source"))
    check_apart(splits, _prompt, what="prompt", separate=separate)
    require_filled(splits)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    train, validation, test = (tuple(splits[name]) for name in SPLITS)
    return InstructionSplits(train, validation, test, (f"examples: {sizes}", *notes))


def read_examples(source: str) -> list[Example]:
    """Read all examples of one source, in its order; InputError: an entry without a response."""
    return [_example(row) for row in parse_source(source).read_rows()]


def _example(row: Row) -> Example:
    messages = entry_messages(row.fields, row.where)
    if messages[-1].role != "assistant":
        if "messages" in row.fields:
            raise InputError(f"{row.where}: the last message has role {messages[-1].role}; expected assistant")
        row.field("output")
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


def _bring_together(splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """Move each example to the first split that has its prompt."""
    first = first_places(splits, _prompt)
    together: dict[str, list[Example]] = {name: [] for name in splits}
    for example in itertools.chain(*splits.values()):
        together[first[example.prompt][0]].append(example)
    return together
