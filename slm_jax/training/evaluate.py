"""Evaluation of batches on all devices: sums of loss, weights and a task's own metrics."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax.model import Params
from slm_jax.training.sharding import host_rows, put_batch
from slm_jax.training.step import Batch, CompiledByShape, LossFn, make_eval_step
from slm_jax.training.task import EvaluationSums


class Evaluator:
    """Evaluates batches without dropout; compiled once for each width of a batch.

    Args:
        loss_fn: the task's.
        mesh: the devices.
        trainable: the trained parameters, arrays or shapes with shardings.
        frozen: the others, placed.
        rows: of a batch; rounded up to what the devices share evenly, as rows that fill a batch have weight 0.
        check: called for each batch; may raise to stop early.
    """

    def __init__(
        self, loss_fn: LossFn, mesh: Mesh, trainable: Params, frozen: Params, rows: int, check: Callable[[], None]
    ):
        self.rows = math.ceil(rows / mesh.size) * mesh.size
        self._mesh, self._frozen, self._check = mesh, frozen, check
        self._step = CompiledByShape(jax.jit(make_eval_step(loss_fn)), trainable, frozen)

    def begin(self, batch: Batch) -> Future[Any]:
        """Begin to compile the step for a batch's shapes."""
        return self._step.begin(batch)

    def __call__(self, trainable: Params, batches: Iterable[Batch]) -> EvaluationSums:
        """Evaluate every batch, and add up."""
        sums = []
        rows = host_rows(self.rows)
        for batch in batches:
            self._check()
            host_batch = {key: fill_rows(value, self.rows)[rows] for key, value in batch.items()}
            sums.append(self._step(trainable, self._frozen, put_batch(self._mesh, host_batch)))
        each = jax.tree.map(lambda value: np.asarray(value, np.float64), jax.device_get(sums))
        loss_sum, weight_sum, metrics = jax.tree.map(lambda *values: np.sum(values, axis=0), *each)
        return EvaluationSums(float(loss_sum), float(weight_sum), metrics)


def fill_rows(values: np.ndarray, rows: int) -> np.ndarray:
    """Fill the values of a batch up to so many rows with zeros, which have weight 0."""
    return np.concatenate([values, np.zeros((rows - len(values), *values.shape[1:]), values.dtype)])
