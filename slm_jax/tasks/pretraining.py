"""Pretraining: predict the next token of running text."""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax

from slm_jax.data.corpus import Corpus, load_corpus
from slm_jax.data.packing import PackedRows, packed_batches, packed_validation_batches
from slm_jax.data.windows import check_window, steps_per_epoch, train_batches, validation_batches
from slm_jax.errors import InputError
from slm_jax.generation.decode import generate
from slm_jax.model import GPTModel, Params, init_params
from slm_jax.nn.blocks import merge_params
from slm_jax.nn.heads import HEAD_ADAPTER, head_kernel
from slm_jax.nn.loss import cross_entropy
from slm_jax.tasks.base import count_steps, find_base, new_base, prepare_params
from slm_jax.tasks.config import RunConfig
from slm_jax.training.start import Start
from slm_jax.training.step import Batch, LossFn, Sums
from slm_jax.training.task import Task

PROMPT_TOKENS = 8  # of the validation text, to start a sample with


def build(config: RunConfig, start: Start, stop: Callable[[], None] | None = None) -> Task:
    """Prepare pretraining: text, tokenizer, batches, model and loss.

    Args:
        config: the run's configuration.
        start: where the run starts.
        stop: called between the phases; may raise to stop early.

    Raises:
        InputError: data, tokenizer and model that do not fit together.
    """
    if config.data.packing and config.data.stride is not None:
        stride = config.data.stride
        raise InputError(f"data.stride is {stride}, but packed rows have none; leave it or data.packing out")
    base = find_base(config, start)
    corpus = load_corpus(config.data, config.tokenizer, saved=base.tokenizer if base else None, stop=stop)
    base = base or new_base(config, corpus.tokenizer)
    cfg = base.model_config
    model = GPTModel(cfg)
    batches = (_packed if config.data.packing else _windows)(config, corpus, cfg.context_length)
    return Task(
        model_config=cfg,
        params=prepare_params(config, start, base, functools.partial(init_params, cfg)),
        loss_fn=make_loss_fn(model),
        train_batches=batches.train,
        validation_batches=batches.validation,
        total_steps=count_steps(config, batches.rows_per_epoch),
        tokens_per_step=batches.tokens_per_step,
        tokenizer=corpus.tokenizer,
        fingerprint=corpus.fingerprint(),
        bytes_per_token=corpus.bytes_per_token,
        sample=_sampler(config, model, corpus),
        notes=(*corpus.notes, *batches.notes),
        next_commands=_next_commands(config, corpus),
    )


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Both splits cut into rows, and what that comes to."""

    train: grain.MapDataset
    validation: Callable[[], Iterable[Batch]]
    rows_per_epoch: float
    tokens_per_step: int
    notes: tuple[str, ...] = ()


def _windows(config: RunConfig, corpus: Corpus, context: int) -> _Batches:
    data, batch_size = config.data, config.train.batch_size
    cut: dict[str, Any] = {"context_length": context, "sampling": data.sampling, "stride": data.stride}
    train = train_batches(corpus.train, batch_size=batch_size, shuffle=data.shuffle, seed=config.seed, **cut)
    check_window(corpus.validation.size, context, "validation")
    return _Batches(
        train=train,
        validation=lambda: validation_batches(
            corpus.validation, context_length=context, batch_size=config.train.eval_batch_size or batch_size
        ),
        rows_per_epoch=batch_size * steps_per_epoch(corpus.train.size, batch_size=batch_size, **cut),
        tokens_per_step=batch_size * context,
    )


def _packed(config: RunConfig, corpus: Corpus, context: int) -> _Batches:
    batch_size, eot_id = config.train.batch_size, corpus.tokenizer.eot_id
    for split, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        check_window(tokens.size, 1, split)
    train, validation = PackedRows(corpus.train, eot_id, context), PackedRows(corpus.validation, eot_id, context)
    alone = train.n_documents == 1
    return _Batches(
        train=packed_batches(train, batch_size=batch_size, shuffle=config.data.shuffle, seed=config.seed),
        validation=lambda: packed_validation_batches(validation, batch_size=config.train.eval_batch_size or batch_size),
        rows_per_epoch=len(train),
        tokens_per_step=round(batch_size * train.tokens_per_row),
        notes=(train.describe() + ("; there is only one: data.packing has nothing to keep apart" if alone else ""),),
    )


def make_loss_fn(model: GPTModel) -> LossFn:
    """Return the loss of next-token prediction: cross-entropy in nats, summed over the targets that count."""

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, key: jax.Array | None) -> Sums:
        params = merge_params(frozen, trainable)
        run = functools.partial(
            model.apply,
            {"params": params},
            batch["inputs"],
            positions=batch.get("positions"),
            segment_ids=batch.get("segment_ids"),
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )
        targets, weights = batch["targets"], batch["weights"]
        if HEAD_ADAPTER in params:  # beside the kernel: its part of the logits is added to them
            loss = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(run(), targets) * weights)
        else:
            hidden: Any = run(method="hidden")
            loss = cross_entropy(hidden, head_kernel(params), targets, weights)
        return loss, jnp.sum(weights), {}

    return loss_fn


def _sampler(config: RunConfig, model: GPTModel, corpus: Corpus) -> Callable[[Params, jax.Array], str] | None:
    """Return what writes a sample while training; the prompt is checked now, not after an hour."""
    cfg, tokenizer = config.sample, corpus.tokenizer
    if not cfg.every:
        return None
    try:
        prompt = tokenizer.encode(_prompt(config, corpus)) or [tokenizer.eot_id]
    except InputError as error:
        raise InputError(f"sample.prompt: {error}") from None
    if len(prompt) > model.cfg.context_length:
        raise InputError(
            f"sample.prompt has {len(prompt)} tokens, more than the context of {model.cfg.context_length}; shorten it"
        )

    def sample(params: Params, key: jax.Array) -> str:
        ids = generate(
            model,
            params,
            jnp.array([prompt]),
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            eos_id=tokenizer.eot_id,
            key=key,
        )[0].tolist()
        if tokenizer.eot_id in ids[len(prompt) :]:
            ids = ids[: ids.index(tokenizer.eot_id, len(prompt))]
        return tokenizer.decode(ids)

    return sample


def _prompt(config: RunConfig, corpus: Corpus) -> str:
    """Return the configured prompt, or the first tokens of the validation text, which any tokenizer knows."""
    if config.sample.prompt is not None:
        return config.sample.prompt
    ids = corpus.validation[:PROMPT_TOKENS].tolist()
    end = ids.index(corpus.tokenizer.eot_id) if corpus.tokenizer.eot_id in ids else len(ids)
    return corpus.tokenizer.decode(ids[:end])


def _next_commands(config: RunConfig, corpus: Corpus) -> tuple[str, ...]:
    folder = shlex.quote(str(config.folder))
    more = "" if config.train.steps is None else f" --train.steps {2 * config.train.steps}"
    if config.train.epochs is not None:
        more += f" --train.epochs {2 * config.train.epochs:g}"
    return (
        f"slm-jax generate --run {folder} --prompt {shlex.quote(' '.join(_prompt(config, corpus).split()))}",
        f"slm-jax train --config {shlex.quote(str(config.folder / 'config.yaml'))}{more}",
    )
