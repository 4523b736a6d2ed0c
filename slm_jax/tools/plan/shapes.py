"""The shapes of a run's model and of what is trained of it, without weights and without text."""

import dataclasses
from typing import Any, NamedTuple

import jax

from slm_jax.data.token_file import json_path, read_description
from slm_jax.errors import InputError
from slm_jax.files import user_path
from slm_jax.model import GPTConfig, Params, get_gpt_config
from slm_jax.runs import find_checkpoint
from slm_jax.tasks.base import as_configured, run_dtype
from slm_jax.tasks.config import RunConfig, get_task
from slm_jax.tokenizer import get_tokenizer
from slm_jax.training.checkpoint import read_metadata
from slm_jax.training.trainable import split_params
from slm_jax.weights.hub import PINS

GPT2_IDS = 50_257


class Shapes(NamedTuple):
    """A run's model.

    Attributes:
        cfg: its configuration, computing as the run does.
        trainable, frozen: two trees of shapes.
        seq: tokens of a row.
        n_outputs: columns of the logits: the vocabulary, or classes.
        notes: what had to be assumed, a line each.
    """

    cfg: GPTConfig
    trainable: Params
    frozen: Params
    seq: int
    n_outputs: int
    notes: tuple[str, ...]


def find_shapes(config: RunConfig) -> Shapes:
    """Return the shapes of a run's model.

    Raises:
        InputError: a base whose shape cannot be told, or is another than asked for; a shape that no model can have.
    """
    if config.base is None:
        vocab_size, notes = _vocab_size(config)
        cfg = config.gpt_config(1 if vocab_size is None else vocab_size, run_dtype(config))
        if vocab_size is None:
            cfg = dataclasses.replace(cfg, unpadded_vocab_size=None)
    else:
        cfg, notes = _base_config(config, config.base)
        cfg = as_configured(cfg, config)
    model = get_task(config.task).shapes(config, cfg)
    notes, params = (*notes, *model.notes), model.params
    trainable, frozen = params, {}
    if config.base is not None:
        trainable, frozen = jax.eval_shape(lambda tree: split_params(tree, config, jax.random.key(0)), params)
    return Shapes(cfg, trainable, frozen, model.seq, model.n_outputs, notes)


def _vocab_size(config: RunConfig) -> tuple[int | None, tuple[str, ...]]:
    """Return the tokenizer's ids, None if only the text could tell, and what was assumed."""
    tokenizer, (kind, _, path) = config.tokenizer, config.data.source.partition(":")
    if tokenizer.path is not None:
        return get_tokenizer(tokenizer.path).vocab_size, ()
    if kind == "tokens" and path and (description := json_path(user_path(path))).is_file():
        return read_description(description)["vocab_size"], ()
    if tokenizer.kind == "gpt2":
        return GPT2_IDS, ()
    if kind == "tokens":
        return GPT2_IDS, (f"assumed: GPT-2's {GPT2_IDS:,} token ids, as {path} is not there yet",)
    if tokenizer.kind == "bpe":
        return tokenizer.vocab_size, ()
    size = (
        config.gpt_config(1).vocab_size if config.model.vocab_size else get_gpt_config(config.model.preset).vocab_size
    )
    return (None if config.model.vocab_size else size), (
        f"assumed: {size:,} token ids, as only the text tells how many the tokenizer {tokenizer.kind} has; "
        "--model.vocab_size N plans for another number",
    )


def _base_config(config: RunConfig, base: str) -> tuple[GPTConfig, tuple[str, ...]]:
    """Return the shape of what the run starts from; a run's, one of GPT-2's, or that of the tiny recipe to come."""
    checkpoint = find_checkpoint(base)
    if checkpoint is not None:
        metadata: dict[str, Any] = read_metadata(checkpoint[0] / "checkpoints", checkpoint[1])
        return GPTConfig(**metadata["model"]), ()
    if base in PINS:
        return get_gpt_config(base), ()
    tiny = RunConfig(run="tiny", runs_dir=config.runs_dir)
    if user_path(base) == tiny.folder:
        return tiny.gpt_config(tiny.tokenizer.vocab_size), (f"{base} is not there: assumed what train makes of it",)
    raise InputError(
        f"base {base} is no run that is there, and the shape of other weights is not looked up; expected a run's "
        f"folder (train it first) or one of {', '.join(PINS)}"
    )
