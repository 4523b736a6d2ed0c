"""What training starts from: a model with its tokenizer, and which of its parameters are trained."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from slm_jax.errors import InputError
from slm_jax.model import PRESETS, DType, GPTConfig, Params
from slm_jax.runs import find_checkpoint, find_tokenizer, load_model, read_frozen
from slm_jax.tokenizer import Tokenizer, fingerprint, get_tokenizer, tokenizer_from_dict
from slm_jax.training.checkpoint import load_opt_state, read_metadata
from slm_jax.training.config import BaseRunConfig, ModelConfig
from slm_jax.training.hardware import best_dtype
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.resume import Start
from slm_jax.training.task import Parameters, purpose_key
from slm_jax.training.trainable import leaf_table, split_params

_EXECUTION = ("drop_rate", "remat", "attention", "unroll")  # what a run may change of its base


@dataclasses.dataclass(frozen=True)
class Base:
    """What a run starts from.

    Attributes:
        model_config: configuration of the model, with this run's execution.
        tokenizer: tokenizer of the model.
        params: parameters of the model; None: a new model, or a run that resumes from its checkpoint.
    """

    model_config: GPTConfig
    tokenizer: Tokenizer
    params: Params | None


def find_base(config: BaseRunConfig, start: Start) -> Base | None:
    """Return what the run starts from: its own checkpoint or ``config.base``; None for a new model."""
    if config.base_optimizer and config.base is None:
        raise InputError("base_optimizer is true and base is null; expected a base that is a run, such as runs/x@1200")
    if start.step is not None:
        tokenizer = tokenizer_from_dict(start.metadata["tokenizer"])
        if config.base is None:  # the configuration has the whole shape, and is compared with the run's
            return new_base(config, tokenizer)
        return Base(as_configured(GPTConfig(**start.metadata["model"]), config), tokenizer, None)
    if config.base is None:
        return None
    wanted = _wanted_tokenizer(config)
    checkpoint = find_checkpoint(config.base)
    own = None
    if checkpoint is not None:
        metadata = read_metadata(checkpoint[0] / "checkpoints", checkpoint[1])
        if "classes" in metadata:
            raise InputError(f"base {config.base} is a classifier; expected the run that it was made from")
        own = tokenizer_from_dict(metadata.get("tokenizer", {}))
        _check_tokenizer(config, own, wanted)
    loaded = load_model(config.base, wanted)
    if checkpoint is None and wanted is not None:
        try:
            own = find_tokenizer(config.base, loaded.model_config)
        except InputError:  # there is none beside the weights
            own = wanted
        _check_tokenizer(config, own, wanted)
    return Base(as_configured(loaded.model_config, config), loaded.tokenizer, loaded.params)


def new_base(config: BaseRunConfig, tokenizer: Tokenizer) -> Base:
    """Return the base of a new model."""
    return Base(config.gpt_config(tokenizer.vocab_size, run_dtype(config)), tokenizer, None)


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
    """Return the optimizer state of the base, if ``base_optimizer`` requests it."""
    if not config.base_optimizer:
        return None
    checkpoint = None if config.base is None else find_checkpoint(config.base)
    if checkpoint is None:
        raise InputError(f"base_optimizer is true and base {config.base} is no run; leave base_optimizer out")
    folder, step = checkpoint
    leaves = read_metadata(folder / "checkpoints", step).get("leaves")
    if config.trainable == "lora" or leaves != leaf_table(trainable):
        raise InputError(
            f"base_optimizer is true and {folder} trained other parameters than trainable: {config.trainable} does "
            "here; leave base_optimizer out"
        )
    like = jax.eval_shape(make_optimizer(config.optimizer).init, trainable)
    return load_opt_state(folder / "checkpoints", step, like)


def count_steps(config: BaseRunConfig, n_rows: float) -> int:
    """Return the number of steps: ``train.steps`` or ``train.epochs`` over ``n_rows`` rows, whichever is less."""
    limits = [config.train.steps] if config.train.steps is not None else []
    if config.train.epochs is not None:
        limits.append(math.ceil(config.train.epochs * n_rows / config.train.batch_size))
    return min(limits)


def run_dtype(config: BaseRunConfig) -> DType:
    """Return the dtype that a run computes in: as configured, or what suits the device."""
    return best_dtype() if config.model.dtype == "auto" else config.model.dtype


def as_configured(cfg: GPTConfig, config: BaseRunConfig) -> GPTConfig:
    """Return a base's configuration with the run's execution; refuse another shape than the base's."""
    section = dataclasses.asdict(config.model)
    preset = (
        {} if section["preset"] == ModelConfig().preset else PRESETS[section["preset"]]
    )  # the default is no request
    given = {name: value for name, value in section.items() if value is not None and name not in ("preset", "dtype")}
    shape = {**preset, **given}
    if any(shape[name] != getattr(cfg, name) for name in preset if name != "vocab_size"):
        raise InputError(f"model.preset is {section['preset']}, and the base has another shape; leave it out")
    for name, value in given.items():
        if name not in _EXECUTION and value != getattr(cfg, name):
            raise InputError(f"model.{name} is {value}, and the base's is {getattr(cfg, name)}; leave it out")
    changes = {name: given[name] for name in _EXECUTION if name in given}
    return dataclasses.replace(cfg, **changes, dtype=run_dtype(config))


def _wanted_tokenizer(config: BaseRunConfig) -> Tokenizer | None:
    if config.tokenizer.path is not None:
        return get_tokenizer(config.tokenizer.path)
    return get_tokenizer("gpt2") if config.tokenizer.kind == "gpt2" else None


def _check_tokenizer(config: BaseRunConfig, own: Tokenizer, wanted: Tokenizer | None) -> None:
    """Refuse another tokenizer than the base's; the default kind, bpe, is no request."""
    other_kind = wanted is None and config.tokenizer.kind not in ("bpe", own.to_dict()["kind"])
    if other_kind or (wanted is not None and fingerprint(own) != fingerprint(wanted)):
        raise InputError(
            f"base {config.base} was trained with another tokenizer than the one requested; leave tokenizer.kind and "
            "tokenizer.path out, or use another base"
        )


def row_length(requested: int | None, key: str, cfg: GPTConfig) -> int:
    """Return the most tokens of a row: as many as the key ``key`` requests, by default the model's context."""
    if requested is not None and requested > cfg.context_length:
        raise InputError(f"{key} is {requested}; expected at most the model's context of {cfg.context_length}")
    return requested or cfg.context_length
