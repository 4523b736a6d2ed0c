"""Classification: tell the class of a text, with a small head in place of the next token's."""

import functools
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slm_jax.data.corpus import make_tokenizer
from slm_jax.data.labelled import LabelledSplits, class_weights, load_labelled
from slm_jax.data.text_batches import bucket_width, classification_batches, classification_eval_batches, encode_texts
from slm_jax.evaluation.classes import ClassFigures, class_figures, class_table, draw_confusion
from slm_jax.model import GPTClassifier, GPTConfig, Params, init_classifier
from slm_jax.nn.blocks import merge_params
from slm_jax.tasks.base import count_steps, find_base, longest_allowed, new_base, prepare_params
from slm_jax.tasks.config import RunConfig
from slm_jax.tokenizer import Tokenizer
from slm_jax.training.start import Start
from slm_jax.training.step import Batch, LossFn, Sums
from slm_jax.training.task import Evaluate, EvaluationSums, Moment, Task

SPLITS = ("train", "validation", "test")


def build(config: RunConfig, start: Start, stop: Callable[[], None] | None = None) -> Task:
    """Prepare fine-tuning on labelled texts: splits, base, batches, head and loss.

    Args:
        config: the run's configuration.
        start: where the run starts.
        stop: called between the phases; may raise to stop early.

    Raises:
        InputError: texts, labels and a base that cannot be used, or not together.
    """
    check = stop or (lambda: None)
    section, train = config.classification, config.train
    splits = load_labelled(config.data, section, config.seed)
    check()
    base = find_base(config, start)
    if base is None:
        texts = (list(splits.train.texts), list(splits.validation.texts))
        base = new_base(config, make_tokenizer(config.tokenizer, *texts))
    check()
    cfg, labels = base.model_config, {name: getattr(splits, name).labels for name in SPLITS}
    encoded, longest, notes = _encode(splits, base.tokenizer, config, cfg)
    check()
    model = GPTClassifier(cfg, n_classes=len(splits.classes), pooling=section.pooling)
    metadata = {"classes": list(splits.classes), "pooling": section.pooling, "max_length": longest}
    shape: dict[str, Any] = {"limit": longest, "bucketed": section.pad_to == "batch"}
    rows = train.eval_batch_size or train.batch_size
    evaluation_batches = {
        name: functools.partial(classification_eval_batches, encoded[name], labels[name], batch_size=rows, **shape)
        for name in SPLITS
    }
    weights = _text_weights(labels["train"], len(splits.classes), section.balance)
    figures = functools.partial(_figures, classes=splits.classes)
    return Task(
        model_config=cfg,
        params=prepare_params(config, start, base, functools.partial(init_classifier, model)),
        loss_fn=make_loss_fn(model),
        train_batches=classification_batches(
            encoded["train"], labels["train"], weights, batch_size=train.batch_size, seed=config.seed, **shape
        ),
        validation_batches=evaluation_batches["validation"],
        longest=bucket_width(max(len(ids) for texts in encoded.values() for ids in texts), longest),
        total_steps=count_steps(config, len(encoded["train"])),
        tokens_per_step=round(train.batch_size * np.mean([len(ids) for ids in encoded["train"]])),
        tokenizer=base.tokenizer,
        metadata=metadata,
        fingerprint=splits.fingerprint(),
        unit="text",
        figures=lambda sums: {"accuracy": figures(sums).accuracy},
        measure=functools.partial(_measure, evaluation_batches, figures),
        report=functools.partial(_report, classes=splits.classes),
        notes=(*splits.notes, *notes),
        next_commands=_next_commands(config),
    )


def make_loss_fn(model: GPTClassifier) -> LossFn:
    """Return the loss of classification: cross-entropy in nats, summed over texts by their weight.

    Its metrics are ``confusion`` (n_classes, n_classes): how many texts of each class (rows) were taken for which.
    """

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, key: jax.Array | None) -> Sums:
        logits: Any = model.apply(
            {"params": merge_params(frozen, trainable)},
            batch["inputs"],
            batch["lengths"],
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        counted = (batch["weights"] > 0).astype(jnp.float32)
        true = jax.nn.one_hot(batch["labels"], model.n_classes) * counted[:, None]
        predicted = jax.nn.one_hot(logits.argmax(-1), model.n_classes)
        return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"]), {"confusion": true.T @ predicted}

    return loss_fn


def _encode(
    splits: LabelledSplits, tokenizer: Tokenizer, config: RunConfig, cfg: GPTConfig
) -> tuple[dict[str, list[np.ndarray]], int, list[str]]:
    """Return the token ids of each split's texts, the most that one may have, and what was cut off."""
    longest = longest_allowed(config.classification.max_length, "classification.max_length", cfg)
    encoded, notes = {}, []
    for name in SPLITS:  # training first: its longest text may be what the others are cut off after
        texts = getattr(splits, name).texts
        encoded[name], n_truncated = encode_texts(texts, tokenizer, longest)
        if n_truncated:
            notes.append(f"{name}: {n_truncated:,} of {len(texts):,} texts cut off after {longest} tokens")
        if name == "train" and config.classification.pad_to == "longest":
            longest = max(map(len, encoded[name]))
    return encoded, longest, notes


def _text_weights(labels: np.ndarray, n_classes: int, balance: str) -> np.ndarray:
    """Return the weight of each training text in the loss."""
    if balance != "class_weights":
        return np.ones(len(labels), np.float32)
    return class_weights(labels, n_classes)[labels]


def _figures(sums: EvaluationSums, classes: tuple[str, ...]) -> ClassFigures:
    return class_figures(np.rint(sums.metrics["confusion"]).astype(np.int64), classes)


def _measure(
    batches: Mapping[str, Callable[[], Iterable[Batch]]],
    figures: Callable[[EvaluationSums], ClassFigures],
    _params: Params,
    evaluate: Evaluate,
    moment: Moment,
    folder: Path | None,
) -> dict[str, Any]:
    """Return loss, accuracy and the figures of each class on all three splits; afterwards draw them, too."""
    sums = {name: evaluate(split()) for name, split in batches.items()}
    measured = {name: figures(split) for name, split in sums.items()}
    if folder is not None and moment == "after":
        draw_confusion(measured, folder / "confusion.png", f"{folder.name}: confusion")
    return {name: {"loss": sums[name].loss, **measured[name].to_dict()} for name in SPLITS}


def _report(before: dict[str, Any] | None, after: dict[str, Any], classes: tuple[str, ...]) -> list[str]:
    lines = []
    for name in SPLITS:
        was = "" if before is None else f" (before training {before[name]['accuracy']:.2%})"
        lines.append(f"{name}: accuracy {after[name]['accuracy']:.2%}{was}, loss {after[name]['loss']:.4f}")
        lines += class_table(class_figures(np.array(after[name]["confusion"]), classes)).splitlines()
    return lines


def _next_commands(config: RunConfig) -> tuple[str, ...]:
    folder = shlex.quote(str(config.folder))
    return (f'slm-jax classify --run {folder} "a text of yours"',)
