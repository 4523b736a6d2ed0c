"""What fine-tuning starts from: a model with its tokenizer, and which of its parameters are trained."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from slm_jax.errors import InputError
from slm_jax.model import PRESETS, DType, GPTConfig, Params
from slm_jax.runs import find_checkpoint, find_tokenizer, load_model, read_frozen
from slm_jax.tasks.config import RunConfig
from slm_jax.tokenizer import Tokenizer, fingerprint, get_tokenizer, tokenizer_from_dict
from slm_jax.training.checkpoint import load_opt_state, read_metadata
from slm_jax.training.config import ModelConfig
from slm_jax.training.hardware import best_dtype
from slm_jax.training.identity import identity
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.run_folder import FROZEN
from slm_jax.training.start import Start
from slm_jax.training.task import Parameters, purpose_key
from slm_jax.training.trainable import leaf_table, split_params

_EXECUTION = ("drop_rate", "remat", "attention", "unroll")  # what of a base may be changed


@dataclasses.dataclass(frozen=True)
class Base:
    """What a run starts from.

    Attributes:
        model_config: the model's, computing as this run does.
        tokenizer: the model's.
        params: its parameters; None: there are none yet (a new model), or a checkpoint has them (a run that goes on).
    """

    model_config: GPTConfig
    tokenizer: Tokenizer
    params: Params | None


def find_base(config: RunConfig, start: Start) -> Base | None:
    """Return what the run starts from: its own checkpoint or ``config.base``; None for a new model.

    Raises:
        InputError: a base that cannot be loaded, has another tokenizer than asked for, or another shape.
    """
    if config.base_optimizer and config.base is None:
        raise InputError("base_optimizer is true and base is null; expected a base that is a run, such as runs/x@1200")
    if start.step is not None:
        tokenizer = tokenizer_from_dict(start.metadata["tokenizer"])
        if config.base is None:  # the configuration has the whole shape, and is compared with the run's
            return new_base(config, tokenizer)
        return Base(as_configured(GPTConfig(**start.metadata["model"]), config), tokenizer, None)
    if config.base is None:
        return None
    given = _given_tokenizer(config)
    checkpoint = find_checkpoint(config.base)
    if checkpoint is not None:
        _check_run(config, read_metadata(checkpoint[0] / "checkpoints", checkpoint[1]), given)
    loaded = load_model(config.base, given)
    if checkpoint is None and given is not None:
        _check_beside(config.base, loaded.model_config, given)
    return Base(as_configured(loaded.model_config, config), loaded.tokenizer, loaded.params)


def new_base(config: RunConfig, tokenizer: Tokenizer) -> Base:
    """Return the base of a new model, which has no parameters yet."""
    return Base(config.gpt_config(tokenizer.vocab_size, run_dtype(config)), tokenizer, None)


def prepare_params(config: RunConfig, start: Start, base: Base, init: Callable[[jax.Array], Params]) -> Parameters:
    """Return what is trained of a model, and what is not.

    Args:
        config: the run's.
        start: where the run starts.
        base: what it starts from.
        init: from a key, a new model's whole params tree, of which the base replaces what it has.

    Raises:
        InputError: parameters that cannot be split as asked for; a damaged file of frozen ones.
    """
    if config.base is None:
        return Parameters({}, {}, init)
    key = purpose_key(config.seed, "params")

    def split(params: Params) -> tuple[Params, Params]:
        return split_params(params, config, jax.random.fold_in(key, 1))

    shapes = jax.eval_shape(init, key)
    if base.params is not None:
        new = {name for name in shapes if name not in base.params}
        added = jax.jit(lambda key: {name: tree for name, tree in init(key).items() if name in new})(key)
        # To the host: what the devices hold of them while training is the loop's to place.
        trainable, frozen = jax.device_get(split({name: base.params.get(name) or added[name] for name in shapes}))
        return Parameters(trainable, frozen, opt_state=_base_opt_state(config, trainable))
    # Refused now: the files of a run of something else would be taken for damaged.
    start.check_identity({**start.metadata["identity"], **identity(config, base.model_config)})
    trainable, frozen = jax.eval_shape(split, shapes)
    if not frozen:
        return Parameters(trainable, {})
    saved = read_frozen(start.source.path, start.metadata)
    if leaf_table(saved) != leaf_table(frozen):
        raise InputError(
            f"{start.source.path / FROZEN}: is of another model than this run's; restore it, or start anew with --run "
            "NAME"
        )
    return Parameters(trainable, saved)


def _base_opt_state(config: RunConfig, trainable: Params) -> Any:
    """Return the state of the base's optimizer; None where it is not asked for.

    Raises:
        InputError: the base has none, or one for other parameters.
    """
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
            "here; leave base_optimizer out, or train the same"
        )
    like = jax.eval_shape(make_optimizer(config.optimizer).init, trainable)
    return load_opt_state(folder / "checkpoints", step, like)


def count_steps(config: RunConfig, n_rows: float) -> int:
    """Return the steps of the run: as many as asked for, or as the epochs over ``n_rows`` take, whichever is less."""
    limits = [config.train.steps] if config.train.steps is not None else []
    if config.train.epochs is not None:
        limits.append(math.ceil(config.train.epochs * n_rows / config.train.batch_size))
    return min(limits)


def run_dtype(config: RunConfig) -> DType:
    """Return what a run computes in: as configured, or what suits the device."""
    return best_dtype() if config.model.dtype == "auto" else config.model.dtype


def as_configured(cfg: GPTConfig, config: RunConfig) -> GPTConfig:
    """Return a base's configuration with the run's execution.

    Raises:
        InputError: the run asks for another shape than the base's.
    """
    section = dataclasses.asdict(config.model)
    preset = {} if section["preset"] == ModelConfig().preset else PRESETS[section["preset"]]  # the default is nobody's
    shape = {**preset, **{name: value for name, value in section.items() if value is not None}}
    if any(shape[name] != getattr(cfg, name) for name in preset if name != "vocab_size"):
        raise InputError(f"model.preset is {section['preset']}, and the base has another shape; leave it out")
    for name, value in section.items():
        if name in ("preset", "dtype", *_EXECUTION) or value is None:
            continue
        if value != getattr(cfg, name):
            raise InputError(
                f"model.{name} is {value}, and the base's is {getattr(cfg, name)}; leave it out: a base has its shape"
            )
    changes = {name: section[name] for name in _EXECUTION if section[name] is not None}
    return dataclasses.replace(cfg, **changes, dtype=run_dtype(config))


def _given_tokenizer(config: RunConfig) -> Tokenizer | None:
    if config.tokenizer.path is not None:
        return get_tokenizer(config.tokenizer.path)
    return get_tokenizer("gpt2") if config.tokenizer.kind == "gpt2" else None


def _check_run(config: RunConfig, metadata: dict[str, Any], given: Tokenizer | None) -> None:
    """Refuse, before its weights are read, a run that is a classifier or has another tokenizer than asked for."""
    if "classes" in metadata:
        raise InputError(f"base {config.base} is a classifier; choose the run that it was made from")
    own, kind = tokenizer_from_dict(metadata.get("tokenizer", {})), config.tokenizer.kind
    other_kind = kind != "bpe" and own.to_dict()["kind"] != kind  # bpe is also what nobody asked for
    if other_kind or (given is not None and fingerprint(own) != fingerprint(given)):
        raise _another_tokenizer(config.base)


def _check_beside(source: str, cfg: GPTConfig, given: Tokenizer) -> None:
    """Refuse another tokenizer than the one that lies beside weights."""
    try:
        own = find_tokenizer(source, cfg)
    except InputError:  # there is none
        return
    if fingerprint(own) != fingerprint(given):
        raise _another_tokenizer(source)


def _another_tokenizer(source: str | None) -> InputError:
    return InputError(
        f"base {source} was trained with another tokenizer than the one asked for; leave tokenizer.kind and "
        "tokenizer.path out, or choose another base"
    )


def longest_allowed(asked: int | None, key: str, cfg: GPTConfig) -> int:
    """Return the most tokens that a row may have: as many as are ``asked`` for, or None for the model's context.

    Args:
        asked: the value of the configuration's ``key``.
        key: its name, for the error.
        cfg: the model's configuration.

    Raises:
        InputError: more than the context.
    """
    if asked is not None and asked > cfg.context_length:
        raise InputError(
            f"{key} is {asked}, more than the model's context of {cfg.context_length}; expected at most that"
        )
    return asked or cfg.context_length
