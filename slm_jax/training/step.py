"""One optimizer step, as a pure function that is compiled once.

``loss_fn(trainable, frozen, batch, key) -> (loss_sum, weight_sum, metrics)`` is the task's; everything here is the
same for each task. ``trainable`` and ``frozen`` are disjoint trees that merge into the model's parameters.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from slm_jax.model import Params

Batch = dict[str, Any]
Sums = tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]
LossFn = Callable[[Params, Params, Batch, jax.Array | None], Sums]


class TrainState(flax.struct.PyTreeNode):
    """What a step changes.

    Attributes:
        step: steps done, skipped ones included.
        trainable: the parameters that are optimised.
        opt_state: Optax's state for them.
        key: of dropout; a step uses ``fold_in(key, step)``.
    """

    # Not checked for shapes: JAX puts avals, shardings and shape structs into the same class.
    step: Any
    trainable: Any
    opt_state: Any
    key: Any


class StepMetrics(NamedTuple):
    """What a step reports, as float32 scalars on the device.

    Attributes:
        loss: mean over the weighted targets of the batch, before the update.
        weight_sum: how many targets that was.
        grad_norm: global norm of the gradients, before clipping.
        learning_rate: the rate of this update.
        skipped: whether loss or gradients were not finite, so that nothing was updated.
    """

    loss: Float[Array, ""]
    weight_sum: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skipped: Array


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, schedule: optax.Schedule, accumulate: int = 1
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]:
    """Return ``train_step(state, frozen, batch) -> (state, metrics)``, to be jitted with the state donated.

    Args:
        loss_fn: ``(trainable, frozen, batch, key) -> (loss_sum, weight_sum, metrics)``.
        optimizer: as :func:`slm_jax.training.optimizer.make_optimizer` gives it.
        schedule: the learning rate of a step, which is reported.
        accumulate: micro-batches that a batch is cut into; divides its rows.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, loss_sum, weight_sum = accumulated_gradients(loss_fn, state.trainable, frozen, batch, key, accumulate)
        # One mean over all tokens of all micro-batches and hosts; a batch without targets has no loss to speak of.
        loss = loss_sum / weight_sum
        grads = jax.tree.map(lambda g: (g / weight_sum).astype(g.dtype), grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        updates = jax.tree.map(lambda u: -learning_rate * u, updates)
        trainable = optax.apply_updates(state.trainable, updates)

        # Select: multiplying an update by zero would leave its NaN.
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        metrics = StepMetrics(loss, weight_sum, grad_norm, learning_rate, ~finite)
        return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    return train_step


def accumulated_gradients(
    loss_fn: LossFn, trainable: Params, frozen: Params, batch: Batch, key: jax.Array, accumulate: int
) -> tuple[Params, Float[Array, ""], Float[Array, ""]]:
    """Return gradients of the summed loss, that sum, and the summed weights, over ``accumulate`` micro-batches.

    Sums, not means: a micro-batch with fewer counted targets then weighs less, as it does in the whole batch.
    """

    def loss_and_weight(trainable: Params, batch: Batch, key: jax.Array) -> tuple[Array, Array]:
        loss_sum, weight_sum, _ = loss_fn(trainable, frozen, batch, key)
        return loss_sum, weight_sum

    grad_fn = jax.value_and_grad(loss_and_weight, has_aux=True)
    if accumulate == 1:
        (loss_sum, weight_sum), grads = grad_fn(trainable, batch, key)
        return grads, loss_sum, weight_sum

    def add_micro_batch(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        (loss_sum, weight_sum), grads = grad_fn(trainable, *micro)
        return jax.tree.map(jnp.add, total, (grads, loss_sum, weight_sum)), None

    # Micro-batch j takes rows j, j + accumulate, …: each device's share of the batch gives to every one of them.
    micro_batches = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
    )
    zeros = jax.tree.map(jnp.zeros_like, (trainable, jnp.float32(0), jnp.float32(0)))
    total, _ = jax.lax.scan(add_micro_batch, zeros, (micro_batches, jax.random.split(key, accumulate)))
    return total


def make_eval_step(loss_fn: LossFn) -> Callable[[Params, Params, Batch], Sums]:
    """Return ``eval_step(trainable, frozen, batch) -> (loss_sum, weight_sum, metrics)``, without dropout."""

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> Sums:
        return loss_fn(trainable, frozen, batch, None)

    return eval_step


def compile_in_background(lowered: Any) -> Future[Any]:
    """Compile a program while Python goes on: XLA works without Python's lock.

    Programs for a GPU are compiled one after another: what is chosen for them depends on how fast it runs.
    """
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lowered.compile)
    pool.shutdown(wait=jax.default_backend() == "gpu")
    return future


class CompiledByShape:
    """A step, compiled ahead of time once for each shape of batch that comes.

    Args:
        step: jitted; its last argument is the batch.
        arguments: the others, as arrays or shapes with shardings.
    """

    def __init__(self, step: Any, *arguments: Any):
        self._step, self._arguments = step, arguments
        self._compiled: dict[tuple[Any, ...], Future[Any]] = {}

    def begin(self, batch: Batch) -> Future[Any]:
        """Begin to compile the step for a batch's shapes (arrays or shapes with shardings)."""
        shapes = tuple(sorted((name, value.shape) for name, value in batch.items()))
        if shapes not in self._compiled:
            self._compiled[shapes] = compile_in_background(self._step.lower(*self._arguments, batch))
        return self._compiled[shapes]

    def compile(self, batch: Batch) -> Any:
        """Return the step compiled for a batch's shapes."""
        return self.begin(batch).result()

    def __call__(self, *arguments: Any) -> Any:
        """Run the step."""
        return self.compile(arguments[-1])(*arguments)
