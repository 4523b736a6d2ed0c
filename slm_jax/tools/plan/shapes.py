"""The shapes of a run, without weights and without text."""

import dataclasses
from collections.abc import Callable, Mapping

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
from slm_jax.training.step import LossFn
from slm_jax.training.task import Parameters
from slm_jax.training.trainable import split_params
from slm_jax.weights.hub import PINS

GPT2_IDS = 50_257
_MANY_STEPS = 10**6  # of a run that ends after epochs


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of a run, from which :func:`slm_jax.training.program.compile_program` compiles its programs.

    Attributes:
        cfg: configuration of the model, computing as the run does.
        params: two trees of shapes, trained and frozen; ``init`` makes random trained ones.
        make_frozen: makes random frozen parameters from the same key.
        loss_fn: the task's loss.
        row: shapes of one row of a batch.
        n_outputs: columns of the logits: the vocabulary, or classes.
        total_steps: steps of the run; a large number if only its text decides.
        notes: assumptions, a line each.
    """

    cfg: GPTConfig
    params: Parameters
    make_frozen: Callable[[jax.Array], Params]
    loss_fn: LossFn
    row: Mapping[str, jax.ShapeDtypeStruct]
    n_outputs: int
    total_steps: int
    notes: tuple[str, ...]

    @property
    def seq(self) -> int:
        """Tokens of a row."""
        return self.row["inputs"].size

    def batch_shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a batch of so many rows."""
        return {name: jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype) for name, leaf in self.row.items()}


def find_shapes(config: RunConfig) -> Shapes:
    """Return the shapes of a run; an InputError for a base whose shape is unknown or differs."""
    if config.base is None:
        vocab_size, notes = _vocab_size(config)
        cfg = config.gpt_config(1 if vocab_size is None else vocab_size, run_dtype(config))
        if vocab_size is None:
            cfg = dataclasses.replace(cfg, unpadded_vocab_size=None)
    else:
        cfg, notes = _base_config(config, config.base)
        cfg = as_configured(cfg, config)
    model = get_task(config.task).shapes(config, cfg)

    def split(params: Params, key: jax.Array) -> tuple[Params, Params]:
        return (params, {}) if config.base is None else split_params(params, config, key)

    trainable, frozen = jax.eval_shape(split, model.params, jax.random.key(0))
    return Shapes(
        cfg=cfg,
        params=Parameters(trainable, frozen, init=lambda key: split(model.init(key), key)[0]),
        make_frozen=lambda key: split(model.init(key), key)[1],
        loss_fn=model.loss_fn,
        row=model.row,
        n_outputs=model.n_outputs,
        total_steps=config.train.steps or _MANY_STEPS,
        notes=(*notes, *model.notes),
    )


def _vocab_size(config: RunConfig) -> tuple[int | None, tuple[str, ...]]:
    """Return the number of token ids (None: model.vocab_size decides), and assumptions."""
    tokenizer, (kind, _, path) = config.tokenizer, config.data.source.partition(":")
    if tokenizer.path is not None:
        return get_tokenizer(tokenizer.path).vocab_size, ()
    if kind == "tokens" and path and (description := json_path(user_path(path))).is_file():
        return read_description(description)["vocab_size"], ()
    if tokenizer.kind == "gpt2":
        return GPT2_IDS, ()
    if kind == "tokens":
        return GPT2_IDS, (f"assumed: GPT-2's {GPT2_IDS:,} token ids, as {path} does not exist yet",)
    if tokenizer.kind == "bpe":
        return tokenizer.vocab_size, ()
    size = config.model.vocab_size or get_gpt_config(config.model.preset).vocab_size
    note = f"assumed: {size:,} token ids; the text decides how many the tokenizer {tokenizer.kind} has"
    return None if config.model.vocab_size else size, (f"{note} (change with --model.vocab_size)",)


def _base_config(config: RunConfig, base: str) -> tuple[GPTConfig, tuple[str, ...]]:
    """Return the model of the base: a run's, one of GPT-2's, or that of the tiny recipe before it is trained."""
    checkpoint = find_checkpoint(base)
    if checkpoint is not None:
        return GPTConfig(**read_metadata(checkpoint[0] / "checkpoints", checkpoint[1])["model"]), ()
    if base in PINS:
        return get_gpt_config(base), ()
    tiny = RunConfig(run="tiny", runs_dir=config.runs_dir)
    if user_path(base) == tiny.folder:
        return tiny.gpt_config(tiny.tokenizer.vocab_size), (f"assumed: {base}, which does not exist yet, is tiny",)
    raise InputError(f"base {base} is no existing run; expected one (train it first) or one of {', '.join(PINS)}")
