"""Pretraining: predict the next token of running text."""

import dataclasses
import functools
import itertools
import shlex
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from slm_jax.data import windows
from slm_jax.data.corpus import Corpus, load_corpus
from slm_jax.errors import InputError
from slm_jax.generation.decode import generate
from slm_jax.model import GPTConfig, GPTModel, Params, init_params, param_shapes
from slm_jax.nn.blocks import merge_params
from slm_jax.nn.heads import HEAD_ADAPTER, head_kernel
from slm_jax.nn.loss import cross_entropy
from slm_jax.tasks.base import count_steps, find_base, new_base, prepare_params
from slm_jax.tasks.config import RunConfig
from slm_jax.training.resume import Start
from slm_jax.training.sharding import of_first_host
from slm_jax.training.step import Batch, LossFn, Sums
from slm_jax.training.task import ModelShapes, Task, token_row

PROMPT_TOKENS = 8  # of the validation text, as the default prompt of samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(Task):
    """Training on running text; samples continue ``prompt``."""

    unused_keys: ClassVar[tuple[str, ...]] = ("data.test_",)

    model: GPTModel
    prompt: str

    @classmethod
    def build(cls, config: RunConfig, start: Start, stop: Callable[[], None] = lambda: None) -> "Pretraining":
        if config.data.packing and config.data.stride is not None:
            raise InputError(f"data.stride is {config.data.stride}; expected null with data.packing")
        base = find_base(config, start)
        saved, verify = base.tokenizer if base else None, jax.process_index() == 0
        corpus = load_corpus(config.data, config.tokenizer, saved=saved, stop=stop, verify=verify)
        base = base or new_base(config, corpus.tokenizer)
        cfg = base.model_config
        task = cls(
            config=config,
            model=GPTModel(cfg),
            prompt=_prompt(config, corpus),
            model_config=cfg,
            params=prepare_params(config, start, base, functools.partial(init_params, cfg)),
            tokenizer=corpus.tokenizer,
            fingerprint=of_first_host(corpus.fingerprint),
            bytes_per_token=corpus.bytes_per_token,
            **(_packed_rows if config.data.packing else _windows)(config, corpus, cfg.context_length),
        )
        if config.sample.every:
            task._prompt_ids()  # a bad prompt is reported now, not after an hour
        return task

    @classmethod
    def shapes(cls, config: RunConfig, cfg: GPTConfig) -> ModelShapes:
        return language_model_shapes(cfg, cfg.context_length, config.data.packing)

    @property
    def loss_fn(self) -> LossFn:
        return make_loss_fn(self.model)

    def sample(self, params: Params, key: jax.Array) -> str:
        section, eos_ids, prompt = self.config.sample, self.tokenizer.eos_ids, self._prompt_ids()
        sampling: dict[str, Any] = {"temperature": section.temperature, "top_k": section.top_k, "key": key}
        sampling |= {"max_new_tokens": section.max_new_tokens, "eos_id": eos_ids}
        ids = generate(self.model, params, jnp.array([prompt]), **sampling)[0].tolist()
        new = itertools.takewhile(lambda id_: id_ not in eos_ids, ids[len(prompt) :])
        return self.tokenizer.decode([*prompt, *new])

    def next_commands(self) -> tuple[str, ...]:
        folder, train = self.config.folder, self.config.train
        more = "" if train.steps is None else f" --train.steps {2 * train.steps}"
        if train.epochs is not None:
            more += f" --train.epochs {2 * train.epochs:g}"
        prompt = shlex.quote(" ".join(self.prompt.split()))
        return (
            f"slm-jax generate --run {shlex.quote(str(folder))} --prompt {prompt}",
            f"slm-jax train --config {shlex.quote(str(folder / 'config.yaml'))}{more}",
        )

    def _prompt_ids(self) -> list[int]:
        try:
            ids = self.tokenizer.encode_prompt(self.prompt)
        except InputError as error:
            raise InputError(f"sample.prompt: {error}") from None
        if len(ids) > (context := self.model_config.context_length):
            raise InputError(f"sample.prompt has {len(ids)} tokens; expected at most the context of {context}")
        return ids


def _windows(config: RunConfig, corpus: Corpus, context: int) -> dict[str, Any]:
    """Return the fields of the task that tell how both splits are cut into windows."""
    data, batch_size = config.data, config.train.batch_size
    cut: dict[str, Any] = {"context_length": context, "sampling": data.sampling, "stride": data.stride}
    batches = windows.train_batches(corpus.train, batch_size=batch_size, shuffle=data.shuffle, seed=config.seed, **cut)
    windows.check_window(corpus.validation.size, context, "validation")
    eval_rows = config.train.eval_batch_size or batch_size
    validation = windows.validation_batches(corpus.validation, context_length=context, batch_size=eval_rows)
    rows_per_epoch = batch_size * windows.steps_per_epoch(corpus.train.size, batch_size=batch_size, **cut)
    return {
        "train_batches": batches,
        "evaluation_batches": {"validation": validation},
        "total_steps": count_steps(config, rows_per_epoch),
        "tokens_per_step": batch_size * context,
        "notes": corpus.notes,
    }


def _packed_rows(config: RunConfig, corpus: Corpus, context: int) -> dict[str, Any]:
    """Return the fields of the task that tell how both splits are packed into rows."""
    batch_size, eot_id = config.train.batch_size, corpus.tokenizer.eot_id
    for split, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        windows.check_window(tokens.size, 1, split)
    train, validation = (windows.PackedRows(tokens, eot_id, context) for tokens in (corpus.train, corpus.validation))
    alone = "; there is only one, so that data.packing separates nothing" if train.n_documents == 1 else ""
    eval_rows = config.train.eval_batch_size or batch_size
    return {
        "train_batches": windows.endless_batches(
            len(train), train.batch, batch_size=batch_size, seed=config.seed, shuffle=config.data.shuffle
        ),
        "evaluation_batches": {"validation": validation.eval_batches(eval_rows)},
        "total_steps": count_steps(config, len(train)),
        "tokens_per_step": round(batch_size * train.tokens_per_row),
        "notes": (*corpus.notes, train.describe() + alone),
    }


def language_model_shapes(cfg: GPTConfig, seq: int, packed: bool, notes: tuple[str, ...] = ()) -> ModelShapes:
    """Return the shapes of a language model that is trained on rows of ``seq`` tokens."""
    init, loss_fn = functools.partial(init_params, cfg), make_loss_fn(GPTModel(cfg))
    return ModelShapes(param_shapes(cfg), init, loss_fn, token_row(seq, packed), cfg.vocab_size, notes)


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


def _prompt(config: RunConfig, corpus: Corpus) -> str:
    """Return the configured prompt, or the first tokens of the validation text."""
    if config.sample.prompt is not None:
        return config.sample.prompt
    ids = corpus.validation[:PROMPT_TOKENS].tolist()
    end = ids.index(corpus.tokenizer.eot_id) if corpus.tokenizer.eot_id in ids else len(ids)
    return corpus.tokenizer.decode(ids[:end])
