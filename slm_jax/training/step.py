"""One optimizer step as a pure function that is compiled once.

Each task has its own ``loss_fn(trainable, frozen, batch, key) -> (loss_sum, weight_sum, metrics)``; the rest is shared.
``trainable`` and ``frozen`` are disjoint trees that merge into the model's parameters; ``frozen`` may
also hold reference models (:class:`slm_jax.training.task.Parameters`). Metrics are sums: scalars are divided by
``weight_sum`` and logged, arrays (such as a confusion matrix) are used in evaluation only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from slm_jax.model import DType, Params
from slm_jax.nn.sharding import COPIES, free_axes

Batch = dict[str, Any]
Sums = tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]
LossFn = Callable[[Params, Params, Batch, jax.Array | None], Sums]


class TrainState(flax.struct.PyTreeNode):
    """Training state: number of steps done (including skipped ones), parameters, Optax's state, and dropout's key.

    Each step uses ``fold_in(key, step)``.
    """

    # Any: JAX also puts abstract values, shardings and shape structs into this class.
    step: Any
    trainable: Any
    opt_state: Any
    key: Any


class StepMetrics(NamedTuple):
    """Metrics of a step, float32 scalars on the device; means are over the weighted targets of the batch."""

    loss: Float[Array, ""]  # mean, before the update
    weight_sum: Float[Array, ""]  # sum of the weights
    grad_norm: Float[Array, ""]  # global norm, before clipping
    learning_rate: Float[Array, ""]  # learning rate of this update
    skipped: Array  # whether loss or gradients were not finite, so that nothing was updated
    metrics: dict[str, Array]  # means of the task's scalar metrics
    bad: Array  # bool (leaves,): whether the gradient of each trained leaf, as jax.tree lists them, was not finite


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int = 1,
    dtype: DType = "float32",
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]:
    """Return ``train_step(state, frozen, batch) -> (state, metrics)``, to be jitted with the state donated.

    The optimizer has no learning rate of its own: ``schedule`` gives it as a function of the step. The batch is split
    into ``accumulate`` micro-batches, a divisor of its rows. ``dtype``: dtype that the model computes in.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, sums = accumulated_gradients(loss_fn, state.trainable, frozen, batch, key, accumulate, dtype)
        loss_sum, weight_sum, metrics = sums
        # One mean over all targets of all micro-batches and hosts. A batch without targets has a loss of NaN.
        loss = loss_sum / weight_sum
        grads = jax.tree.map(lambda g: (g / weight_sum).astype(g.dtype), grads)
        squares = [optax.tree.norm(g, squared=True) for g in jax.tree.leaves(grads)]
        grad_norm = jnp.sqrt(optax.tree.sum(squares))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        updates = jax.tree.map(lambda u: -learning_rate * u, updates)
        trainable = optax.apply_updates(state.trainable, updates)

        # Not a multiplication by zero, which would keep NaN.
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        means = {name: value / weight_sum for name, value in metrics.items()}
        bad = ~jnp.isfinite(jnp.stack(squares))
        report = StepMetrics(loss, weight_sum, grad_norm, learning_rate, ~finite, means, bad)
        return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), report

    return train_step


def accumulated_gradients(
    loss_fn: LossFn,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
    dtype: DType = "float32",
) -> tuple[Params, Sums]:
    """Return the gradients of the summed loss, and (loss_sum, weight_sum, scalar metrics), over all micro-batches.

    Sums, not means, so that a micro-batch with fewer weighted targets counts less, as in the whole batch. Devices with
    copies of the parameters (``slm_jax.nn.sharding.COPIES``) sum their own micro-batches and reduce once, in bfloat16
    if the model computes in it, as XLA does without micro-batches.
    """

    def loss_and_sums(trainable: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[Array, Sums]:
        loss_sum, weight_sum, metrics = loss_fn(trainable, frozen, batch, key)
        return loss_sum, (loss_sum, weight_sum, {name: value for name, value in metrics.items() if value.ndim == 0})

    grad_fn = jax.grad(loss_and_sums, has_aux=True)
    if accumulate == 1:
        return grad_fn(trainable, frozen, batch, key)

    def sum_micro_batches(trainable: Params, frozen: Params, batch: Batch, keys: jax.Array) -> tuple[Params, Sums]:
        def add_micro_batch(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(trainable, frozen, *micro)), None

        # Micro-batch j takes rows j, j + accumulate, …, so that each device's share of the batch contributes to all.
        micro_batches = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        first = jax.tree.map(lambda x: x[0], micro_batches)
        _, shapes = jax.eval_shape(loss_and_sums, trainable, frozen, first, keys[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (trainable, shapes))
        total, _ = jax.lax.scan(add_micro_batch, zeros, (micro_batches, keys))
        return (jax.tree.map(reduce, total[0]), jax.lax.psum(total[1], copies)) if copies else total

    def reduce(gradient: Array) -> Array:
        sent = gradient.astype(jnp.bfloat16) if dtype == "bfloat16" else gradient
        return jax.lax.psum(sent, copies).astype(gradient.dtype)

    copies = free_axes(COPIES)
    if jax.__version_info__ < (0, 8) and copies != free_axes():
        copies = ()  # jax 0.7 cannot split anything inside a shard_map of other axes: it reduces every micro-batch
    if copies:
        of_rows, whole = PartitionSpec(copies), PartitionSpec()
        sum_micro_batches = jax.shard_map(
            sum_micro_batches,
            in_specs=(whole, whole, of_rows, whole),
            out_specs=whole,
            axis_names=set(copies),
            check_vma=False,
        )
    return sum_micro_batches(trainable, frozen, batch, jax.random.split(key, accumulate))


def make_eval_step(loss_fn: LossFn) -> Callable[[Params, Params, Batch], Sums]:
    """Return ``eval_step(trainable, frozen, batch) -> (loss_sum, weight_sum, metrics)``, without dropout."""

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> Sums:
        return loss_fn(trainable, frozen, batch, None)

    return eval_step
