"""The loss of a language model from hidden states, in pieces, so that logits of a whole batch never exist.

GPT-2's 50,257 logits a token are by far the largest arrays of a training step: 6.6 GB in float32 for 32 × 1,024 tokens,
and as much again for their gradient. But the gradient of a softmax cross-entropy is known as soon as its logits are,
so each piece of the sequences is taken from hidden states to gradients before the next one begins, and nothing is
computed twice.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from slm_jax.nn.heads import operands
from slm_jax.nn.sharding import RULES, free_axes, n_devices, on_each_device, splits
from slm_jax.nn.target import target

# The most that one piece's float32 logits take on a device. Each piece also reads and writes the kernel's whole
# gradient, so that small pieces cost time: GPT-2's 50,257 columns leave 2,670 tokens for a piece.
PIECE_BYTES = 2**29
_COLUMNS = 128  # accelerators multiply matrices whose width this does not divide far slower


def cross_entropy(
    hidden: Float[Array, "batch seq emb"],
    kernel: Float[Array, "emb vocab"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
) -> Float[Array, ""]:
    """Sum the cross-entropies of next-token prediction, each times its weight.

    Products are of the hidden states' dtype, accumulated in float32, as in :func:`slm_jax.nn.heads.float32_logits`.
    Gradients are those of ``hidden`` and ``kernel``, whichever are asked for; only reverse mode goes through.

    Args:
        hidden: (batch, seq, emb), after the final norm.
        kernel: (emb, vocab), of the output head.
        targets: int32 (batch, seq), ids below vocab (not checked on the device).
        weights: float32 (batch, seq), constants; 0 leaves a target out.

    Returns:
        The weighted sum in nats, float32.
    """
    return _cross_entropy(hidden, kernel, targets, jax.lax.stop_gradient(weights))


@jax.custom_vjp
def _cross_entropy(hidden: Array, kernel: Array, targets: Array, weights: Array) -> Array:
    return _by_pieces(hidden, kernel, targets, weights, False, False)[0]


def _forward(hidden: Any, kernel: Any, targets: Any, weights: Any) -> tuple[Array, Any]:
    """Compute the loss and the gradients of the trained inputs in one pass; a frozen input costs nothing."""
    loss, *grads = _by_pieces(
        hidden.value, kernel.value, targets.value, weights.value, hidden.perturbed, kernel.perturbed
    )
    return loss, grads


def _backward(grads: Any, cotangent: Any) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda grad: (grad * cotangent).astype(grad.dtype), grads)
    return (*scaled, None, None)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _by_pieces(
    hidden: Array, kernel: Array, targets: Array, weights: Array, of_hidden: bool, of_kernel: bool
) -> tuple[Array, Array | None, Array | None]:
    """Return the loss, and the gradients of hidden states and kernel where wanted.

    On a mesh each device takes its rows and its columns of the vocabulary, and the kernel's gradient is summed once.
    """
    vocab_size = kernel.shape[1]
    rows, columns = splits("batch", len(targets)), free_axes(RULES["vocab"])
    multiple = math.lcm(1 if target().platform == "cpu" else _COLUMNS, n_devices(columns))
    padded = jnp.pad(kernel, ((0, 0), (0, -vocab_size % multiple)))
    inputs, matrix = operands(hidden, padded)
    shards = _Shards(rows, columns, splits("embed", len(kernel)) if "fsdp" in rows else ())
    on_a_device: Callable[..., Any] = functools.partial(_on_a_device, shards, vocab_size, of_hidden, of_kernel)
    if free_axes():
        of_rows, of_matrix = PartitionSpec(rows or None), PartitionSpec(None, columns or None)
        outputs = (
            PartitionSpec(),
            of_rows if of_hidden else None,
            PartitionSpec(shards.width or None, columns or None) if of_kernel else None,
        )
        on_a_device = on_each_device(on_a_device, (of_rows, of_matrix, of_rows, of_rows), outputs)
    loss, hidden_grad, kernel_grad = on_a_device(inputs, matrix, targets, weights)
    return (
        loss,
        None if hidden_grad is None else hidden_grad.astype(hidden.dtype),
        None if kernel_grad is None else kernel_grad[:, :vocab_size].astype(kernel.dtype),
    )


class _Shards(NamedTuple):
    """The axes of the mesh that split the rows, the columns of the kernel, and the width of the kernel's gradient."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    width: tuple[str, ...]


def _on_a_device(
    shards: _Shards,
    vocab_size: int,
    of_hidden: bool,
    of_kernel: bool,
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, Array | None, Array | None]:
    """Return the loss and the gradients of a device's rows and columns, summed over the devices that share them."""
    seq, columns = targets.shape[1], kernel.shape[1]
    first = jax.lax.axis_index(shards.columns) * columns if shards.columns else 0
    run_piece = functools.partial(
        _piece, kernel, first + jnp.arange(columns), vocab_size, shards.columns, of_hidden, of_kernel
    )
    n = n_pieces(len(targets), seq, columns)
    if n == 1:
        (loss, kernel_grad), hidden_grad = run_piece(hidden, targets, weights)
    else:

        def add_piece(sums: Any, piece: Any) -> tuple[Any, Array | None]:
            more, hidden_grad = run_piece(*piece)
            return jax.tree.map(jnp.add, sums, more), hidden_grad

        zeros = (jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32) if of_kernel else None)
        pieces = jax.tree.map(functools.partial(_cut, n=n), (hidden, targets, weights))
        (loss, kernel_grad), hidden_grads = jax.lax.scan(add_piece, zeros, pieces)
        hidden_grad = None if hidden_grads is None else _join(hidden_grads, seq)
    if shards.rows:
        loss = jax.lax.psum(loss, shards.rows)
    if hidden_grad is not None and shards.columns:
        hidden_grad = jax.lax.psum(hidden_grad, shards.columns)
    if kernel_grad is not None and shards.rows:
        if shards.width:
            kernel_grad = jax.lax.psum_scatter(kernel_grad, shards.width, tiled=True)
        if others := tuple(axis for axis in shards.rows if axis not in shards.width):
            kernel_grad = jax.lax.psum(kernel_grad, others)
    return loss, hidden_grad, kernel_grad


def _piece(
    kernel: Array,
    ids: Array,
    vocab_size: int,
    split: tuple[str, ...],
    of_hidden: bool,
    of_kernel: bool,
    hidden: Array,
    targets: Array,
    weights: Array,
) -> tuple[tuple[Array, Array | None], Array | None]:
    """Return ((the loss, the kernel's gradient), the hidden states' gradient) of a piece.

    ``ids`` are those of the kernel's columns; along the axes ``split`` other devices have other columns.
    """
    # All rows in one matrix, as in a dense layer: see dense.rows_times_kernel.
    shape = hidden.shape
    hidden, targets, weights = hidden.reshape(-1, shape[-1]), targets.reshape(-1), weights.reshape(-1)
    logits = jnp.einsum("re,ev->rv", hidden, kernel, preferred_element_type=jnp.float32)
    if split or len(ids) > vocab_size:
        logits = jnp.where(ids < vocab_size, logits, -jnp.inf)
    hits = ids == targets[..., None]
    if split:
        largest = jax.lax.pmax(logits.max(-1, keepdims=True), split)
        normalizer = (largest + jnp.log(jax.lax.psum(jnp.exp(logits - largest).sum(-1, keepdims=True), split)))[..., 0]
        chosen = jax.lax.psum(jnp.where(hits, logits, 0).sum(-1), split)
    else:
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.sum((normalizer - chosen) * weights)
    if not (of_hidden or of_kernel):
        return (loss, None), None
    grad = ((jnp.exp(logits - normalizer[..., None]) - hits) * weights[..., None]).astype(hidden.dtype)
    hidden_grad = jnp.einsum("rv,ev->re", grad, kernel).reshape(shape) if of_hidden else None
    kernel_grad = jnp.einsum("re,rv->ev", hidden, grad, preferred_element_type=jnp.float32) if of_kernel else None
    return (loss, kernel_grad), hidden_grad


def n_pieces(rows: int, seq: int, vocab_size: int) -> int:
    """Return how many pieces ``rows`` sequences of a device are cut into: one, or a power of two, or single tokens."""
    pieces = 4 * rows * seq * vocab_size / PIECE_BYTES
    return 1 if pieces <= 1 else min(seq, 2 ** math.ceil(math.log2(pieces)))


def _cut(x: Array, n: int) -> Array:
    """Cut (batch, seq, ...) along the sequence into (n, batch, seq / n, ...), filled up with zeros, of weight 0."""
    batch, seq, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -seq % n), *((0, 0) for _ in rest)))
    return x.reshape(batch, n, -1, *rest).swapaxes(0, 1)


def _join(pieces: Array, seq: int) -> Array:
    n, batch, size, *rest = pieces.shape
    return pieces.swapaxes(0, 1).reshape(batch, n * size, *rest)[:, :seq]
