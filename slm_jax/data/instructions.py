"""Instructions with responses: from a source to three splits, and from conversations to batches.

A batch has ``inputs`` and ``targets`` (int32, (batch, width)) and ``weights`` (float32, 1 where a target counts, else
0); where examples share rows, also ``segment_ids`` (int32, 1, 2, … and 0 for padding) and ``positions`` (int32, from 0
for each example). Padding is on the right and never a target.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from slm_jax.data.config import DataConfig, InstructionConfig
from slm_jax.data.rows import EmptyField
from slm_jax.data.sources import parse_source
from slm_jax.data.splits import SPLITS, check_apart, grouped, require_filled, share, shared, split_fractions
from slm_jax.data.templates import Message, Template, encode_conversation, entry_messages
from slm_jax.data.windows import Batch, EvalBatches, Rows, TrainBatches, bucket_width, endless_batches
from slm_jax.errors import InputError, located
from slm_jax.tokenizer import Tokenizer


class Example(NamedTuple):
    """A conversation whose last message is the assistant's response, and where it is from, for error messages."""

    where: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to the response."""
        return self.messages[:-1]


_prompt = operator.attrgetter("prompt")


class InstructionSplits(NamedTuple):
    """The examples of each split (:class:`Example`, or pairs of preferences), and notes on the splitting."""

    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    test: tuple[Any, ...]
    notes: tuple[str, ...]


def load_instructions(data: DataConfig, cfg: InstructionConfig, seed: int) -> InstructionSplits:
    """Read and split the examples of ``data``: entries in the form of `entry_messages`, with a response."""
    return split_examples(data, cfg.split, seed, functools.partial(_read, cfg=cfg))


def split_examples(
    data: DataConfig, order: Literal["random", "file_order"], seed: int, read: Callable[[str, list[str]], list[Any]]
) -> InstructionSplits:
    """Read and split the examples of ``data``; ``read(source, notes)`` returns those of a source and adds notes.

    A single source is split by ``data``'s fractions; counts are rounded down, and the rest goes to validation. With
    ``file_order``, training comes first, then test, then validation. With ``random``, examples with the same prompt go
    to the same split.

    Raises:
        InputError: a source or entry that cannot be read; an empty split; a separate validation or test source that
            shares a prompt with another split.
    """
    notes: list[str] = []
    examples = read(data.source, notes)
    if order == "random":
        shuffled = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]
        groups = grouped(shuffled, map(_prompt, shuffled))
        # A group at a boundary is not divided.
        cut = _cut(list(itertools.chain(*groups)), data)
        place = {example.prompt: name for name in reversed(cut) for example in cut[name]}
        splits = {name: [e for e in itertools.chain(*cut.values()) if place[e.prompt] == name] for name in cut}
        if n_repeated := len(examples) - len(groups):
            notes.append(f"{n_repeated:,} of them repeat the prompt of another one, and are in the same split")
    else:
        splits = _cut(examples, data)
        if n_shared := len(shared(splits, _prompt)):
            notes.append(f"{n_shared:,} of them repeat the prompt of one in another split (split: file_order)")
    separate = [name for name in ("validation", "test") if getattr(data, f"{name}_source")]
    for name in separate:
        splits[name] = read(getattr(data, f"{name}_source"), notes)
    check_apart(splits, _prompt, what="prompt", separate=separate)
    require_filled(splits)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    train, validation, test = (tuple(splits[name]) for name in SPLITS)
    return InstructionSplits(train, validation, test, (f"examples: {sizes}", *notes))


def _read(source: str, notes: list[str], cfg: InstructionConfig) -> list[Example]:
    """Return the examples of a source; add to the notes how many entries were left out."""
    empty: list[EmptyField] = []
    examples = read_examples(source, None if cfg.empty == "refuse" else empty.append)
    if empty:
        notes.append(
            f"left out {len(empty):,} of {len(examples) + len(empty):,} entries of {source}, such as {empty[0]}"
        )
    return examples


def read_examples(source: str, on_empty: Callable[[EmptyField], None] | None = None) -> list[Example]:
    """Read all examples of one source, in its order.

    Entries with an empty text are left out, and ``on_empty`` is called with the error; without it they raise.
    InputError: an entry without a response; all are empty.
    """
    examples, error = [], None
    for row in parse_source(source).read_rows():
        try:
            messages = entry_messages(row.fields, row.where)
        except EmptyField as found:
            if on_empty is None:
                raise
            on_empty(error := found)
            continue
        if messages[-1].role != "assistant":
            if "messages" in row.fields:
                raise InputError(f"{row.where}: the last message has role {messages[-1].role}; expected assistant")
            row.field("output")
        examples.append(Example(row.where, messages))
    if error is not None and not examples:
        raise error
    return examples


def _cut(examples: list[Any], data: DataConfig) -> dict[str, list[Any]]:
    """Split the examples in order; a split that has its own source gets none."""
    validation, test = split_fractions(data)
    n = len(examples)
    n_test = share(n, test)
    n_train = share(n, 1 - validation - test) if validation else n - n_test
    n_both = n_train + n_test
    return {"train": examples[:n_train], "validation": examples[n_both:], "test": examples[n_train:n_both]}


# Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One example: token ids, ending with the end-of-text id, and whether each counts in the loss (not the first).

    All but the last are inputs, all but the first are targets.
    """

    ids: Int32[np.ndarray, " tokens"]
    counts: Bool[np.ndarray, " tokens"]

    @property
    def n_inputs(self) -> int:
        """Number of positions in a row."""
        return len(self.ids) - 1


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    template: Template,
    *,
    mask_prompt: bool,
    max_length: int,
    too_long: Literal["drop", "truncate"],
) -> tuple[list[Tokens], tuple[str, ...]]:
    """Turn examples into tokens (`encode_conversation`).

    Each example ends with one end-of-text token, which counts in the loss; prompts count unless ``mask_prompt``.
    ``drop`` leaves out examples with more than ``max_length`` inputs; ``truncate`` cuts tokens off the front, but not
    from the last response: an example is left out if its last response and one token before it do not fit. Also returns
    notes on both. InputError: the tokenizer cannot encode a text; no example remains.
    """
    encoded, n_dropped, cuts = [], 0, []
    for example in examples:
        with located(example.where):
            pieces = encode_conversation(tokenizer, template, example.messages)
        ids = [id_ for piece, _ in pieces for id_ in piece]
        counts = [is_response or not mask_prompt for piece, is_response in pieces for _ in piece]
        excess = len(ids) - 1 - max_length  # the last token, end-of-text, is not an input
        if excess > 0 and (too_long == "drop" or len(pieces[-1][0]) > max_length):
            n_dropped += 1
            continue
        if excess > 0:
            cuts.append(excess)
        start = max(0, excess)
        counted = np.array(counts[start:])
        counted[0] = False
        encoded.append(Tokens(np.array(ids[start:], np.int32), counted))
    total = f"{len(examples):,} example{'' if len(examples) == 1 else 's'}"
    longer = f"{'the response alone is' if too_long == 'truncate' else 'they are'} longer than {max_length} tokens"
    if not encoded:
        remedy = "expected a larger instruction.max_length and model.context_length"
        raise InputError(f"nothing to learn from: {total}, and {longer}; {remedy}")
    notes = []
    if n_dropped:
        notes.append(f"left out {n_dropped:,} of {total}: {longer}")
    if cuts:
        notes.append(f"truncated {len(cuts):,} of {total} to {max_length} tokens: cut {sum(cuts):,} off the front")
    return encoded, tuple(notes)


# Batches

TokenRow = list[Tokens]  # examples that share a row


def pack(tokens: Sequence[Tokens], width: int, seed: int) -> list[TokenRow]:
    """Pack examples into rows of at most ``width`` inputs: first fit, in a random order."""
    room = np.full(len(tokens), width)
    rows: list[TokenRow] = []
    for i in np.random.default_rng(seed).permutation(len(tokens)):
        example = tokens[i]
        assert example.n_inputs <= width, "an example doesn't fit in a row"
        row = int(np.argmax(room >= example.n_inputs))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        room[row] -= example.n_inputs
    return rows


def instruction_batches(
    rows: Sequence[TokenRow], *, batch_size: int, limit: int, bucketed: bool, packed: bool, seed: int
) -> TrainBatches:
    """Return the endless sequence of training batches; element ``i`` is the batch of step ``i``.

    A row has at most ``limit`` tokens. Batches are ``limit`` wide, or if ``bucketed``, the `bucket_width` of their
    longest row. If ``packed``, rows may have several examples, and batches have ``segment_ids`` and ``positions``.
    """
    make = functools.partial(_batch, rows, limit, bucketed, packed)
    return endless_batches(len(rows), make, batch_size=batch_size, seed=seed, whole=bucketed)


def instruction_eval_batches(
    rows: Sequence[TokenRow], *, batch_size: int, limit: int, bucketed: bool, packed: bool
) -> EvalBatches:
    """Return every row once, sorted by length to save padding; padding of the last batch has weight 0."""
    order = np.argsort(list(map(_row_length, rows)), kind="stable")
    return EvalBatches(order, functools.partial(_batch, rows, limit, bucketed, packed), batch_size)


def _batch(
    all_rows: Sequence[TokenRow], limit: int, bucketed: bool, packed: bool, indices: np.ndarray, only: Rows
) -> Batch:
    width = bucket_width(max(_row_length(all_rows[i]) for i in indices), limit) if bucketed else limit
    rows = [all_rows[i] for i in indices[only]]
    names = ("inputs", "targets", "segment_ids", "positions") if packed else ("inputs", "targets")
    batch = {name: np.zeros((len(rows), width), np.int32) for name in names}
    batch["weights"] = np.zeros((len(rows), width), np.float32)
    for r, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            at = np.s_[r, start : start + example.n_inputs]
            batch["inputs"][at] = example.ids[:-1]
            batch["targets"][at] = example.ids[1:]
            batch["weights"][at] = example.counts[1:]
            if packed:
                batch["segment_ids"][at] = segment
                batch["positions"][at] = np.arange(example.n_inputs)
            start += example.n_inputs
    return batch


def _row_length(row: TokenRow) -> int:
    return sum(example.n_inputs for example in row)
