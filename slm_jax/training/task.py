"""What a stage of training gives to the loop."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np

from slm_jax.model import GPTConfig, Params
from slm_jax.tokenizer import Tokenizer
from slm_jax.training.step import Batch, LossFn

Moment = Literal["before", "after"]


@dataclasses.dataclass(frozen=True)
class EvaluationSums:
    """What an evaluation step gives, summed over batches.

    Attributes:
        loss_sum: nats, weighted.
        weight_sum: the weights.
        metrics: the task's own sums.
    """

    loss_sum: float
    weight_sum: float
    metrics: dict[str, np.ndarray]

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.loss_sum / self.weight_sum


Evaluate = Callable[[Iterable[Batch]], EvaluationSums]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What is trained and what is not.

    Attributes:
        trainable: the parameters to train, where they do not come from a key: arrays, or shapes in a run that goes on.
        frozen: the parameters that are not trained.
        init: from a key, a new model's parameters to train; None: ``trainable`` are there already.
        opt_state: the optimizer's state for ``trainable`` to begin with, as arrays on the host; None: a new one.
    """

    trainable: Params
    frozen: Params
    init: Callable[[jax.Array], Params] | None = None
    opt_state: Any = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A stage of training: batches, parameters, loss, and what is measured and kept.

    Attributes:
        model_config: the model's configuration.
        params: the model's parameters.
        loss_fn: see :mod:`slm_jax.training.step`; a key of None means no dropout.
        train_batches: element ``i`` is the global batch of step ``i``.
        validation_batches: the whole validation split once, in global batches.
        longest: the width of the widest batch of all splits; None: all are as wide as the first.
        total_steps: steps of the whole run.
        tokens_per_step: tokens of a training batch, on average.
        tokenizer: the model's, to travel with the run.
        files: more small text files for the run's folder, by name.
        metadata: what else travels with each checkpoint, JSON-able.
        fingerprint: of the data; a run goes on only with the same.
        bytes_per_token: UTF-8 bytes that a validation token stands for, where that is known.
        unit: what the loss is a mean over: tokens or texts.
        figures: from an evaluation's sums, what is logged beside the loss.
        sample: from all parameters and a key, a text; None: no samples.
        samples_with_evaluation: whether a sample is made at each evaluation, and not at ``sample.every``.
        measure: measures the model before the first step and, at its best, after the last: from all parameters, a
            function that evaluates batches, the moment, and the run's folder (None on hosts that do not write), figures
            by split for ``summary.json``, those of ``test`` among them; None: nothing.
        report: from what was measured before (None: unknown) and after, lines for a person.
        notes: what a person should know of the data, a line each.
        next_commands: what to try when the run is done.
    """

    model_config: GPTConfig
    params: Parameters
    loss_fn: LossFn
    train_batches: grain.MapDataset
    validation_batches: Callable[[], Iterable[Batch]]
    total_steps: int
    tokens_per_step: int
    tokenizer: Tokenizer
    fingerprint: str
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    longest: int | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bytes_per_token: float | None = None
    unit: Literal["token", "text"] = "token"
    figures: Callable[[EvaluationSums], dict[str, float]] | None = None
    sample: Callable[[Params, jax.Array], str] | None = None
    samples_with_evaluation: bool = False
    measure: Callable[[Params, Evaluate, Moment, Path | None], dict[str, Any]] | None = None
    report: Callable[[dict[str, Any] | None, dict[str, Any]], list[str]] | None = None
    notes: tuple[str, ...] = ()
    next_commands: tuple[str, ...] = ()


def purpose_key(seed: int, purpose: str) -> jax.Array:
    """Return the key of one purpose: params, dropout or sampling (data order has its own generator)."""
    return jax.random.fold_in(jax.random.key(seed), ("params", "dropout", "sampling").index(purpose))
