"""Classification: predict the class of a text, with a small head in place of the language model's."""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slm_jax.data import labelled
from slm_jax.data.corpus import make_tokenizer
from slm_jax.data.windows import bucket_width
from slm_jax.errors import InputError
from slm_jax.evaluation.classes import ClassFigures, Classifier, class_figures, class_table, draw_confusion
from slm_jax.model import GPTClassifier, GPTConfig, Params, init_classifier
from slm_jax.nn.blocks import merge_params
from slm_jax.nn.int8 import quantize
from slm_jax.runs import get_checkpoint, read_checkpoint
from slm_jax.tasks.base import count_steps, find_base, new_base, prepare_params, row_length
from slm_jax.tasks.config import RunConfig
from slm_jax.tokenizer import tokenizer_from_dict
from slm_jax.training.resume import Start
from slm_jax.training.step import Batch, LossFn, Sums
from slm_jax.training.task import Evaluate, EvaluationSums, ModelShapes, Moment, Task

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Fine-tuning on labelled texts."""

    unit: ClassVar[Literal["token", "text"]] = "text"
    unused_keys: ClassVar[tuple[str, ...]] = ("data.packing", "data.text_column")
    measures: ClassVar[bool] = True
    score: ClassVar[str | None] = "accuracy"
    written: ClassVar[Mapping[str, str]] = {"confusion.png": "confusion matrices"}

    model: GPTClassifier
    classes: tuple[str, ...]

    @classmethod
    def build(cls, config: RunConfig, start: Start, stop: Callable[[], None] = lambda: None) -> "Classification":
        section, train = config.classification, config.train
        splits = labelled.load_labelled(config.data, section, config.seed)
        stop()
        texts: dict[str, list[str]] = {name: list(getattr(splits, name).texts) for name in SPLITS}
        base = find_base(config, start) or new_base(
            config, make_tokenizer(config.tokenizer, texts["train"], texts["validation"])
        )
        stop()
        cfg, labels = base.model_config, {name: getattr(splits, name).labels for name in SPLITS}
        longest, notes = row_length(section.max_length, "classification.max_length", cfg), list(splits.notes)
        encoded = {}
        for name in SPLITS:  # training first: its longest text may limit the other splits
            places = getattr(splits, name).places
            encoded[name], n_truncated = labelled.encode_texts(texts[name], base.tokenizer, longest, places)
            if n_truncated:
                notes.append(f"{name}: {n_truncated:,} of {len(texts[name]):,} texts truncated to {longest} tokens")
            if name == "train" and section.pad_to == "longest":
                longest = max(map(len, encoded[name]))
        stop()
        model = GPTClassifier(cfg, n_classes=len(splits.classes), pooling=section.pooling)
        shape: dict[str, Any] = {"limit": longest, "bucketed": section.pad_to == "batch"}
        rows = train.eval_batch_size or train.batch_size
        weights = np.ones(len(labels["train"]), np.float32)
        if section.balance == "class_weights":
            weights = labelled.class_weights(labels["train"], len(splits.classes))[labels["train"]]
        return cls(
            config=config,
            model=model,
            classes=tuple(splits.classes),
            model_config=cfg,
            params=prepare_params(config, start, base, functools.partial(init_classifier, model)),
            train_batches=labelled.classification_batches(
                encoded["train"], labels["train"], weights, batch_size=train.batch_size, seed=config.seed, **shape
            ),
            evaluation_batches={
                name: labelled.classification_eval_batches(encoded[name], labels[name], batch_size=rows, **shape)
                for name in SPLITS
            },
            longest=bucket_width(max(len(ids) for split in encoded.values() for ids in split), longest),
            total_steps=count_steps(config, len(encoded["train"])),
            tokens_per_step=round(train.batch_size * np.mean([len(ids) for ids in encoded["train"]])),
            tokenizer=base.tokenizer,
            metadata={"classes": list(splits.classes), "pooling": section.pooling, "max_length": longest},
            fingerprint=splits.fingerprint(),
            notes=tuple(notes),
        )

    @classmethod
    def shapes(cls, config: RunConfig, cfg: GPTConfig) -> ModelShapes:
        model = GPTClassifier(dataclasses.replace(cfg, attention="auto"), n_classes=2)
        init = functools.partial(init_classifier, model)
        params = jax.eval_shape(init, jax.random.key(0))
        seq = row_length(config.classification.max_length, "classification.max_length", cfg)
        notes = (f"assumed: two classes, and texts of up to {seq} tokens (classification.max_length)",)
        row = {"inputs": jax.ShapeDtypeStruct((seq,), jnp.int32), "weights": jax.ShapeDtypeStruct((), jnp.float32)}
        row |= dict.fromkeys(("lengths", "labels"), jax.ShapeDtypeStruct((), jnp.int32))
        return ModelShapes(params, init, make_loss_fn(model), row, 2, notes)

    @classmethod
    def check_data(cls, config: RunConfig) -> None:
        labelled.load_labelled(config.data, config.classification, config.seed)

    @property
    def loss_fn(self) -> LossFn:
        return make_loss_fn(self.model)

    def figures(self, sums: EvaluationSums) -> dict[str, float]:
        return {"accuracy": self._class_figures(sums).accuracy}

    def measure(self, params: Params, evaluate: Evaluate, moment: Moment, folder: Path | None) -> dict[str, Any]:
        """Return loss, accuracy and the figures of each class for all splits; after training draw them, too."""
        sums = {name: evaluate(batches) for name, batches in self.evaluation_batches.items()}
        measured = {name: self._class_figures(split) for name, split in sums.items()}
        if folder is not None and moment == "after":
            try:
                draw_confusion(measured, folder / "confusion.png", f"{folder.name}: confusion")
            except (InputError, OSError) as error:
                print(f"warning: confusion.png was not drawn: {error}", file=sys.stderr)
        return {name: {"loss": sums[name].loss, **measured[name].to_dict()} for name in SPLITS}

    def report(self, before: dict[str, Any] | None, after: dict[str, Any]) -> list[str]:
        lines = []
        for name in SPLITS:
            was = "" if before is None else f" (before training {before[name]['accuracy']:.2%})"
            lines.append(f"{name}: accuracy {after[name]['accuracy']:.2%}{was}, loss {after[name]['loss']:.4f}")
            lines += class_table(class_figures(np.array(after[name]["confusion"]), self.classes)).splitlines()
        return lines

    def next_commands(self) -> tuple[str, ...]:
        return (f'slm-jax classify --run {shlex.quote(str(self.config.folder))} "your text"',)

    def _class_figures(self, sums: EvaluationSums) -> ClassFigures:
        return class_figures(np.rint(sums.metrics["confusion"]).astype(np.int64), self.classes)


def make_loss_fn(model: GPTClassifier) -> LossFn:
    """Return the loss of classification: cross-entropy in nats, summed over texts by their weight.

    Its metrics are ``confusion`` (n_classes, n_classes): texts by true class (rows) and predicted class.
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


def load_classifier(source: str | Path, step: int | str = "best", weights: Literal["int8"] | None = None) -> Classifier:
    """Load a classifier that ``slm-jax finetune`` trained with ``task: classification``.

    It is a function from a list of texts to a :class:`Prediction` for each; ``source`` and ``step`` as for
    :func:`slm_jax.runs.load_run`. ``weights="int8"`` stores its matrices in 8 bits.

    Raises:
        MissingInputError: no run there, or no checkpoint of that step.
        InputError: a run that is no classifier; a damaged checkpoint; an invalid step.
    """
    cfg, params, metadata = read_checkpoint(*get_checkpoint(source, step), "float32", classifier=True)
    classes = tuple(metadata["classes"])
    model = GPTClassifier(cfg, n_classes=len(classes), pooling=metadata["pooling"])
    tokenizer = tokenizer_from_dict(metadata["tokenizer"])
    params = params if weights is None else quantize(params)
    return Classifier(model, params, tokenizer, classes, metadata["max_length"])
