"""Preferences: prompts with a chosen and a rejected response, as tokens and batches.

A row of a batch is a pair: ``inputs``, ``targets`` (int32, (batch, 2 · width)) and ``weights`` (float32, 1 for tokens
of a response) have the chosen conversation in the first half and the rejected one in the second, padded on the right.
``pairs`` (float32, (batch,)) is 1, or 0 for rows that fill up a batch; ``reference_chosen`` and ``reference_rejected``
(float32, (batch,)) are the reference model's log-probabilities of the responses.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32

from slm_jax.data.config import DataConfig, PreferenceConfig
from slm_jax.data.instructions import InstructionSplits, Tokens, split_examples
from slm_jax.data.rows import EmptyField, Row
from slm_jax.data.sources import parse_source
from slm_jax.data.templates import Message, Template, encode_conversation, entry_messages
from slm_jax.data.windows import Batch, EvalBatches, Rows, TrainBatches, bucket_width, endless_batches
from slm_jax.errors import InputError, located
from slm_jax.tokenizer import Tokenizer

SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """A conversation whose last message is the chosen response, the rejected one, and where both are from."""

    where: str
    messages: tuple[Message, ...]
    rejected: Message

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to the response."""
        return self.messages[:-1]


def load_preferences(data: DataConfig, cfg: PreferenceConfig, seed: int) -> InstructionSplits:
    """Read and split the pairs of ``data``, as :func:`slm_jax.data.instructions.split_examples` does."""
    return split_examples(data, cfg.split, seed, functools.partial(_read, drop=cfg.empty == "drop"))


def _read(source: str, notes: list[str], drop: bool) -> list[Pair]:
    pairs, dropped = [], []
    for row in parse_source(source).read_rows():
        try:
            pairs.append(read_pair(row))
        except EmptyField as error:
            if not drop:
                raise
            dropped.append(error)
    if dropped and not pairs:
        raise dropped[0]
    if dropped:
        total = len(pairs) + len(dropped)
        notes.append(f"left out {len(dropped):,} of {total:,} pairs of {source}, such as {dropped[0]}")
    return pairs


def read_pair(row: Row) -> Pair:
    """Return the pair of an entry.

    The prompt is ``instruction`` with perhaps ``input``, or ``prompt``; ``chosen`` and ``rejected`` are the responses.
    A prompt or response may also be a list of messages (``role`` and ``content``), as in TRL; without a prompt the
    lists are whole conversations that differ in their last message.

    Raises:
        EmptyField: a text is empty, or both responses are equal.
        InputError: a field is missing or not text, or the conversations differ before their last message.
    """
    sides = [_turns(row, side) for side in SIDES]
    if isinstance(row.fields.get("prompt"), list):
        asked = entry_messages({"messages": row.fields["prompt"]}, f"{row.where}, prompt")
    elif "prompt" in row.fields:
        asked = (Message("user", row.filled("prompt")),)
    elif "instruction" in row.fields:
        asked = entry_messages(
            {name: row.fields[name] for name in ("instruction", "input") if name in row.fields}, row.where
        )
    elif len(sides[0]) > 1:
        asked = sides[0][:-1]
        if sides[1][:-1] != asked:
            raise InputError(f"{row.where}: chosen and rejected differ before their last message; expected one prompt")
        sides = [side[-1:] for side in sides]
    else:
        raise InputError(f"{row.where}: no prompt; expected instruction, prompt, or whole conversations")
    for name, side in zip(SIDES, sides, strict=True):
        if len(side) != 1 or side[0].role != "assistant":
            raise InputError(f"{row.where}: {name} is not one response; expected one message of the assistant")
    chosen, rejected = (side[0] for side in sides)
    if chosen == rejected:
        raise EmptyField(f"{row.where}: chosen and rejected are equal; expected two responses")
    return Pair(row.where, (*asked, chosen), rejected)


def _turns(row: Row, side: str) -> tuple[Message, ...]:
    """Return the messages of a side: a text is one response."""
    content = row.field(side)
    if not isinstance(content, list):
        return (Message("assistant", row.filled(side)),)
    if len(content) == 1 and isinstance(content[0], Mapping):
        message = Row(f"{row.where}, {side}", content[0])
        return (Message("assistant", message.filled("content")),) if message.text("role") == "assistant" else ()
    return entry_messages({"messages": content}, f"{row.where}, {side}")


class PairTokens(NamedTuple):
    """The tokens of both conversations; only the responses count."""

    chosen: Tokens
    rejected: Tokens

    @property
    def n_inputs(self) -> int:
        """Number of positions of the longer one."""
        return max(side.n_inputs for side in self)


def encode_pairs(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    too_long: Literal["drop", "truncate"],
) -> tuple[list[PairTokens], tuple[str, ...]]:
    """Turn pairs into tokens; each response ends with one end-of-text token.

    ``drop`` leaves out pairs of which a side has more than ``max_length`` inputs; ``truncate`` cuts as many tokens off
    the front of both prompts, and leaves out pairs of which a response alone does not fit. Also returns notes on both.
    InputError: the tokenizer cannot encode a text; no pair remains.
    """
    encoded, n_dropped, n_cut = [], 0, 0
    for pair in pairs:
        sides = []
        with located(pair.where):
            for response in (pair.messages[-1], pair.rejected):
                *before, (answer, _) = encode_conversation(tokenizer, template, (*pair.prompt, response))
                sides.append(([id_ for ids, _ in before for id_ in ids], answer))
        excess = max(len(prompt) + len(answer) - 1 for prompt, answer in sides) - max_length
        if excess > 0 and (too_long == "drop" or any(excess >= len(prompt) for prompt, _ in sides)):
            n_dropped += 1
            continue
        n_cut += excess > 0
        encoded.append(PairTokens(*(_tokens(prompt[max(0, excess) :], answer) for prompt, answer in sides)))
    total = f"{len(pairs):,} pair{'' if len(pairs) == 1 else 's'}"
    if not encoded:
        remedy = "expected a larger preference.max_length and model.context_length"
        raise InputError(f"nothing to learn from: {total}, all longer than {max_length} tokens; {remedy}")
    notes = []
    if n_dropped:
        notes.append(f"left out {n_dropped:,} of {total}: they are longer than {max_length} tokens")
    if n_cut:
        notes.append(f"truncated the prompts of {n_cut:,} of {total}, to {max_length} tokens with their responses")
    return encoded, tuple(notes)


def _tokens(prompt: list[int], answer: list[int]) -> Tokens:
    counts = np.arange(len(prompt) + len(answer)) >= max(1, len(prompt))  # nothing predicts the first token
    return Tokens(np.array([*prompt, *answer], np.int32), counts)


def fingerprint(splits: Mapping[str, Sequence[PairTokens]]) -> str:
    """Return the SHA-256 of the tokens of all splits."""
    digest = hashlib.sha256()
    for name, pairs in splits.items():
        digest.update(f"{name} {len(pairs)}".encode())
        for side in (side for pair in pairs for side in pair):
            digest.update(f" {len(side.ids)} ".encode() + side.ids.astype("<u4").tobytes() + side.counts.tobytes())
    return digest.hexdigest()


# Batches

References = Float32[np.ndarray, "pairs 2"]  # log-probabilities of the chosen and the rejected responses


@dataclasses.dataclass(frozen=True, eq=False)
class PairRows:
    """The pairs of a split with the reference's log-probabilities; ``limit``: most tokens of a conversation."""

    pairs: Sequence[PairTokens]
    references: References
    limit: int

    def train_batches(self, batch_size: int, seed: int) -> TrainBatches:
        """Return the endless sequence of training batches; element ``i`` is the batch of step ``i``."""
        return endless_batches(len(self.pairs), self._batch, batch_size=batch_size, seed=seed, whole=True)

    def eval_batches(self, batch_size: int) -> EvalBatches:
        """Return every pair once, sorted by length to save padding."""
        return EvalBatches(self.order, self._batch, batch_size)

    @property
    def order(self) -> np.ndarray:
        """The pairs as :meth:`eval_batches` goes through them."""
        return np.argsort([pair.n_inputs for pair in self.pairs], kind="stable")

    def _batch(self, indices: np.ndarray, only: Rows) -> Batch:
        width = bucket_width(max(self.pairs[i].n_inputs for i in indices), self.limit)
        chosen = indices[only]
        batch: dict[str, Any] = {name: np.zeros((len(chosen), 2, width), np.int32) for name in ("inputs", "targets")}
        batch["weights"] = np.zeros((len(chosen), 2, width), np.float32)
        for r, i in enumerate(chosen):
            for s, side in enumerate(self.pairs[i]):
                batch["inputs"][r, s, : side.n_inputs] = side.ids[:-1]
                batch["targets"][r, s, : side.n_inputs] = side.ids[1:]
                batch["weights"][r, s, : side.n_inputs] = side.counts[1:]
        batch = {name: value.reshape(len(chosen), -1) for name, value in batch.items()}
        references = {f"reference_{side}": self.references[chosen, s] for s, side in enumerate(SIDES)}
        return {**batch, "pairs": np.ones(len(chosen), np.float32), **references}
