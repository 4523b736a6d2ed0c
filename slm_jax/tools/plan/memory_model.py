"""The memory of one training step from closed formulas, for devices that are not here and for large models.

What is kept for the backward pass, per token and block (E = embed, M = mlp, Q = query, key and value together, A =
heads · head_dim, T = tokens of a row, H = heads, G = heads and kv_heads, c = bytes of a number in ``dtype``):

====================  ======================  ===========================================================
what                  bytes                   which arrays
====================  ======================  ===========================================================
two norms             8 E + 8                 float32: normalised; 1 / deviation
inputs of products    (2 E + Q + A) c         the norms' outputs; q, k, v; the input of out_proj
GELU                  2 M c                   its output and slope
 SwiGLU               3 M c                   instead: its output and two slopes
qk_norm               4 G (head_dim + 1)      float32, as for the norms
attention             H T (4 + c) + 8 H       exponentials in float32, weights; their maxima and sums
 flash, cuDNN         A c + 4 H               instead: its output, head by head; the logarithms of the sums
dropout               2 E + H T               masks
remat dots            (2 E + Q + M) c         with SwiGLU 2 M; instead of all above: products and the block's input
remat full            E c                     instead of all above: the block's input
====================  ======================  ===========================================================

The tests compare these with what JAX saves, which is exactly this, and with XLA's analysis of compiled steps. XLA
decides which arrays exist at the same time and what it copies, so that part is an estimate.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.model import GPTConfig, Params, Remat, axis_sizes, is_unrolled, param_shapes
from slm_jax.nn.axes import Axes, map_axes
from slm_jax.nn.loss import n_pieces
from slm_jax.nn.sharding import RULES, param_spec
from slm_jax.nn.target import Target
from slm_jax.training.optimizer import muon_or_adam

# Measured of XLA's CPU compiler, in sizes of the gradients: Adam's moments are copied before they are updated.
_CPU_COPIES = 1.8
# In a program without loops some of that happens while activations are alive (none at 2 layers, 0.8 at 12), and more
# is kept than JAX asks for: products beside what is made of them, and scores.
_UNROLLED_COPIES = 0.5
_UNROLLED_WIDTHS, _UNROLLED_WEIGHTS = 24, 3  # float32 arrays of a token's E, and of its H T


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device computes at a time."""

    cfg: GPTConfig  # with the dtype and remat of the run
    target: Target
    attention: str  # explicit, xla, cudnn or flash
    rows: int  # sequences of a micro-batch
    seq: int  # tokens of a sequence
    n_outputs: int  # columns of the logits on this device: of the vocabulary, or classes
    trained_blocks: int  # with a backward pass; those before them keep nothing
    accumulate: int = 1  # micro-batches of a step
    tensor: int = 1  # devices that split the blocks' hidden features between them
    fsdp: int = 1  # devices that split every parameter between them

    @property
    def tokens(self) -> int:
        return self.rows * self.seq

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.cfg.dtype).itemsize

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the model's axes on this device; ``qkv``: of those products; ``products``: of those to ``mlp``."""
        sizes = {
            name: size // self.tensor if RULES.get(name) == ("tensor",) else size
            for name, size in axis_sizes(self.cfg).items()
        }
        qkv = (sizes["heads"] + 2 * sizes["kv_heads"]) * sizes["head_dim"]
        return {**sizes, "qkv": qkv, "products": sizes["mlp"] * (2 if self.cfg.mlp == "swiglu" else 1)}

    @property
    def unrolled_on_cpu(self) -> bool:
        """Whether the blocks are compiled one by one for a CPU."""
        return self.target.platform == "cpu" and is_unrolled(self.cfg, "cpu")

    @property
    def remat(self) -> Remat:
        """What is computed again; unrolled on a CPU nothing, as the compiler merges the two computations."""
        return "none" if self.unrolled_on_cpu else self.cfg.remat


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes on one device of what lasts from step to step, and of the gradients."""

    parameters: float
    optimizer: float
    gradients: float
    gathered: float = 0.0  # other devices' shares that a device holds while it computes (mesh.fsdp)
    summed: float = 0.0  # likewise of the gradient of a table or head, in the loss


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device; not all parts exist at the same time."""

    parameters: float
    optimizer: float
    gradients: float  # accumulating doubles them
    batch: float  # inputs, targets and weights of all micro-batches
    activations: float  # kept for the backward pass
    logits: float  # before the backward pass of the blocks: a piece's, the head's kernel as multiplied, the final norm
    block: float  # after that: one block's activations computed again, and the gradients in it
    workspace: float  # known copies of the compiler, and gathered parameters
    total: float  # the peak


def step_memory(work: Work, state: State) -> Memory:
    embed, itemsize, tokens = work.sizes["embed"], work.itemsize, work.tokens
    everywhere = dataclasses.replace(work, cfg=dataclasses.replace(work.cfg, remat="none"))
    everything = saved_bytes(everywhere) + _padding_bytes(work)
    saved = everything if work.remat == "none" else saved_bytes(work)
    # A TPU casts the weights of all blocks before the loop, also where they are recomputed from.
    casts = everywhere if work.target.platform == "tpu" else work
    activations = (saved * tokens + copied_weights(casts) / work.fsdp) * work.trained_blocks
    logits = (
        state.summed + _logits_bytes(work) + tokens * embed * (4 + 2 * itemsize) + work.n_outputs * embed * itemsize
    )
    inner = (work.sizes["products"] + work.sizes["mlp"] + work.sizes["qkv"] + embed) * itemsize
    block = tokens * (everything - saved + _attention_bytes(work) + _padding_bytes(work) + inner)
    gradients = state.gradients * (1 if work.accumulate == 1 else 2)
    batch = 3 * 4 * tokens * work.accumulate
    workspace, temporary = state.gathered, gradients + state.gathered + activations + max(logits, block)
    if work.target.platform == "cpu":
        copies = state.gradients * _CPU_COPIES
        workspace += copies
        early = state.gradients * _UNROLLED_COPIES if work.unrolled_on_cpu else 0.0
        temporary = max(temporary + early, state.gradients + copies)
    total = state.parameters + state.optimizer + batch + temporary
    return Memory(state.parameters, state.optimizer, gradients, batch, activations, logits, block, workspace, total)


def evaluation_memory(work: Work, state: State) -> float:
    """Return the memory of an evaluation of ``work.rows`` sequences, the optimizer's state included."""
    embed, platform = work.sizes["embed"], work.target.platform
    casts = work.cfg.dtype != work.cfg.param_dtype
    # A TPU looks up in a copy of the table, and multiplies by the head's kernel without one, unless pieces share it.
    table = work.sizes["vocab"] * embed * work.itemsize if casts and platform == "tpu" else 0
    kernel = work.n_outputs * embed * work.itemsize if casts and (platform == "gpu" or _pieces(work) > 1) else 0
    gathered = state.gathered
    if work.fsdp > 1:  # what is gathered is that copy, or it is made of a share before it is gathered
        gathered, table, kernel = gathered * work.itemsize / jnp.dtype(work.cfg.param_dtype).itemsize, 0, 0
    block = work.tokens * (2.0 * embed + work.sizes["products"] + work.sizes["mlp"]) * work.itemsize
    if work.attention not in ("cudnn", "flash"):
        block += work.tokens * _attention_bytes(work)
    largest = max(_logits_bytes(work) + kernel, block + table)
    return state.parameters + state.optimizer + gathered + 12 * work.tokens + largest


def saved_bytes(work: Work) -> float:
    """Return the bytes of one token that one block keeps for the backward pass: the table above."""
    sizes, itemsize = work.sizes, work.itemsize
    embed, mlp, qkv, heads = (sizes[name] for name in ("embed", "mlp", "qkv", "heads"))
    if work.remat == "full":
        return embed * itemsize
    if work.remat == "dots":
        return (2 * embed + qkv + sizes["products"]) * itemsize
    if work.unrolled_on_cpu:  # the widths are measured of GPT-2's shape
        others = qkv - 3 * embed + sizes["products"] + mlp - 8 * embed
        return 4 * (_UNROLLED_WIDTHS * embed + others + _UNROLLED_WEIGHTS * heads * work.seq)
    inputs = 2 * embed + qkv + heads * sizes["head_dim"] + sizes["products"] + mlp
    masks = 2 * embed if work.cfg.drop_rate else 0
    norms = 2 * (embed + 1) + (heads + sizes["kv_heads"]) * (sizes["head_dim"] + 1) * work.cfg.qk_norm
    return norms * 4 + inputs * itemsize + _attention_bytes(work) + masks


def copied_weights(work: Work) -> float:
    """Return the bytes of a block's matrices that are kept in ``dtype``, if they are stored in another."""
    if work.remat != "none" or work.cfg.dtype == work.cfg.param_dtype:
        return 0.0

    def numbers(axes: Axes | None, leaf: Any) -> int:
        assert axes is not None
        is_copied = axes.stack and axes.is_matrix
        return math.prod(work.sizes[name] for name in axes.inputs + axes.outputs) if is_copied else 0

    return work.itemsize * sum(jax.tree.leaves(map_axes(numbers, param_shapes(work.cfg))))


def state_bytes(trainable: Params, frozen: Params, fsdp: int = 1, muon: bool = False, tensor: int = 1) -> State:
    """Return the bytes of a training state on one of the devices that split it, along ``fsdp`` and ``tensor``."""
    sizes = {"fsdp": fsdp, "tensor": tensor}
    shares = _leaf_bytes(trainable, sizes)
    trained = sum(shares)
    moments = 2 * trained
    if muon:
        labels = jax.tree.leaves(muon_or_adam(trainable))
        moments -= sum(share for share, label in zip(shares, labels, strict=True) if label == "muon")
    gathered = 0.0
    if fsdp > 1:  # one block at a time, and the embeddings
        parts = [{name: tree[name]} for tree in (frozen, trainable) for name in tree]
        gathered = max(sum(_leaf_bytes(part, {**sizes, "fsdp": 1}, one_layer=True)) for part in parts)
    tables = [leaf.size for leaf in jax.tree.leaves(map_axes(_of_vocabulary, trainable)) if leaf is not None]
    summed = 4 * max(tables, default=0) * (1 - 1 / fsdp) / tensor
    return State(trained + sum(_leaf_bytes(frozen, sizes)), moments, trained, gathered, summed)


def _of_vocabulary(axes: Axes | None, leaf: Any) -> Any:
    return leaf if axes is not None and axes.is_matrix and "vocab" in axes.names else None


def _leaf_bytes(tree: Params, sizes: dict[str, int], one_layer: bool = False) -> list[float]:
    """Return the bytes of each leaf on one device of a mesh of these sizes; of a single layer, if asked for."""

    def n_bytes(axes: Axes | None, leaf: Any) -> float:
        shards = math.prod(sizes[name] for name in param_spec(axes, leaf.shape, sizes) if name)
        layers = leaf.shape[0] if one_layer and axes is not None and axes.stack else 1
        return leaf.size * leaf.dtype.itemsize / shards / layers

    return jax.tree.leaves(map_axes(n_bytes, tree))


def _logits_bytes(work: Work) -> float:
    """Return the bytes of a piece's float32 logits; what is computed from them reuses their memory."""
    return 4 * work.tokens * work.n_outputs / _pieces(work)


def _pieces(work: Work) -> int:
    return n_pieces(work.rows, work.seq, work.n_outputs)


def _attention_bytes(work: Work) -> float:
    heads = work.sizes["heads"]
    if work.attention in ("cudnn", "flash"):
        return heads * work.sizes["head_dim"] * work.itemsize + 4 * heads
    mask = 1 if work.cfg.drop_rate else 0
    return heads * (work.seq * (4 + work.itemsize + mask) + 8)


def _padding_bytes(work: Work) -> float:
    """Return what a TPU's flash attention adds to a token's q, k, v and output: heads of 128 numbers."""
    if work.attention != "flash":
        return 0.0
    heads = 2 * (work.sizes["heads"] + work.sizes["kv_heads"])
    return heads * (-work.sizes["head_dim"] % 128) * work.itemsize
