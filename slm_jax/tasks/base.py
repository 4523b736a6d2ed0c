"""What training starts from: a model with its tokenizer, and which of its parameters are trained."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from slm_jax.data.templates import Template
from slm_jax.errors import InputError
from slm_jax.model import PRESETS, GPTConfig, Params
from slm_jax.runs import find_checkpoint, load_model, read_frozen
from slm_jax.tokenizer import Tokenizer, fingerprint, get_tokenizer, same_tokens, tokenizer_from_dict
from slm_jax.training.checkpoint import load_opt_state, read_metadata
from slm_jax.training.config import BaseRunConfig, ModelConfig
from slm_jax.training.hardware import run_dtype
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.resume import Start
from slm_jax.training.task import Parameters, purpose_key
from slm_jax.training.trainable import leaf_table, split_params

_EXECUTION = ("drop_rate", "remat", "attention", "unroll")  # what a run may change of its base


class Base(NamedTuple):
    """What a run starts from."""

    model_config: GPTConfig
    tokenizer: Tokenizer
    params: Params | None = None  # None: of a new model, or of a run that resumes from its checkpoint
    template: Template | None = None  # of the conversations that it was trained on


def find_base(config: BaseRunConfig, start: Start) -> Base | None:
    """Return what the run starts from: its own checkpoint or ``config.base``; None for a new model."""
    if config.base_optimizer and config.base is None:
        raise InputError("base_optimizer is true and base is null; expected a base that is a run, such as runs/x@1200")
    if start.step is not None:
        tokenizer = tokenizer_from_dict(start.metadata["tokenizer"])
        if config.base is None:  # the configuration has the whole shape, and is compared with the run's
            return new_base(config, tokenizer)
        return Base(as_configured(GPTConfig(**start.metadata["model"]), config), tokenizer)
    if config.base is None:
        return None
    kind, path = config.tokenizer.kind, config.tokenizer.path
    path = "gpt2" if path is None and kind == "gpt2" else path
    wanted = None if path is None else get_tokenizer(path)
    try:
        loaded = load_model(config.base)
    except InputError:
        if wanted is None:
            raise
        loaded = load_model(config.base, wanted)  # weights without a tokenizer beside them
    own = loaded.tokenizer
    if wanted is None:
        other = kind not in ("bpe", own.to_dict()["kind"])  # the default kind, bpe, requests nothing
    else:
        other = fingerprint(own) != fingerprint(wanted) and not same_tokens(own, wanted)
    if other:
        raise InputError(f"base {config.base} has another tokenizer; leave tokenizer.kind and tokenizer.path out")
    return Base(as_configured(loaded.model_config, config), own, loaded.params, loaded.template)


def new_base(config: BaseRunConfig, tokenizer: Tokenizer) -> Base:
    """Return the base of a new model."""
    return Base(config.gpt_config(tokenizer.vocab_size, run_dtype(config)), tokenizer)


def prepare_params(config: BaseRunConfig, start: Start, base: Base, init: Callable[[jax.Array], Params]) -> Parameters:
    """Return what is trained of a model, and what is not.

    ``init`` makes a new model's whole params tree from a key; the base replaces what it has.
    """
    if config.base is None:
        return Parameters({}, {}, init)
    key = purpose_key(config.seed, "params")
    shapes = jax.eval_shape(init, key)

    def split(params: Params) -> tuple[Params, Params]:
        return split_params(params, config, jax.random.fold_in(key, 1))

    if base.params is None:
        trainable, frozen = jax.eval_shape(split, shapes)
        return Parameters(trainable, read_frozen(start.folder.path, start.metadata) if frozen else {})
    new = {name for name in shapes if name not in base.params}
    added = jax.jit(lambda key: {name: tree for name, tree in init(key).items() if name in new})(key)
    # On the host: the loop places what the devices hold.
    trainable, frozen = jax.device_get(split({name: base.params.get(name) or added[name] for name in shapes}))
    return Parameters(trainable, frozen, opt_state=_base_opt_state(config, trainable))


def _base_opt_state(config: BaseRunConfig, trainable: Params) -> Any:
    if not config.base_optimizer:
        return None
    checkpoint = find_checkpoint(config.base or "")
    if checkpoint is None:
        raise InputError(f"base_optimizer is true and base {config.base} is no run; leave base_optimizer out")
    checkpoints, step = checkpoint[0] / "checkpoints", checkpoint[1]
    if config.trainable == "lora" or read_metadata(checkpoints, step).get("leaves") != leaf_table(trainable):
        trained = f"{config.base} trained other parameters"
        raise InputError(f"base_optimizer is true, but {trained}; expected the same trainable")
    return load_opt_state(checkpoints, step, jax.eval_shape(make_optimizer(config.optimizer).init, trainable))


def count_steps(config: BaseRunConfig, n_rows: float) -> int:
    """Return the number of steps: ``train.steps`` or ``train.epochs`` over ``n_rows`` rows, whichever is less."""
    train = config.train
    epochs = None if train.epochs is None else math.ceil(train.epochs * n_rows / train.batch_size)
    return min(limit for limit in (train.steps, epochs) if limit is not None)


def as_configured(cfg: GPTConfig, config: BaseRunConfig) -> GPTConfig:
    """Return a base's configuration with the run's execution; refuse another shape than the base's."""
    section = dataclasses.asdict(config.model)
    preset, _ = section.pop("preset"), section.pop("dtype")
    if preset != ModelConfig().preset:  # the default requests nothing
        shape = {**PRESETS[preset], **{name: value for name, value in section.items() if value is not None}}
        if any(shape[name] != getattr(cfg, name) for name in PRESETS[preset] if name != "vocab_size"):
            raise InputError(f"model.preset is {preset}, and the base has another shape; leave it out")
    changes = {name: value for name, value in section.items() if value not in (None, getattr(cfg, name))}
    for name, value in changes.items():
        if name not in _EXECUTION:
            raise InputError(f"model.{name} is {value}, and the base's is {getattr(cfg, name)}; leave it out")
    return dataclasses.replace(cfg, **changes, dtype=run_dtype(config))


def row_length(requested: int | None, key: str, cfg: GPTConfig) -> int:
    """Return the most tokens of a row: as many as the key ``key`` requests, by default the model's context."""
    if requested is not None and requested > cfg.context_length:
        raise InputError(f"{key} is {requested}; expected at most the model's context of {cfg.context_length}")
    return requested or cfg.context_length
