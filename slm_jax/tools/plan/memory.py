"""The memory of one training step, from closed formulas: no array is made, nothing is compiled.

What is kept for the backward pass, per token and block (D = width, T = tokens of a row, H = heads, c = bytes of a
number in ``dtype``):

====================  ======================  ===========================================================
what                  bytes                   which arrays
====================  ======================  ===========================================================
two layer norms       8 D + 8                 float32: normalised; 1 / deviation
inputs of products    6 D c                   of qkv and fc (the norms' outputs), q, k, v, of out_proj
GELU                  8 D c                   its output and slope, four times as wide
attention             H T (4 + c) + 8 H       exponentials in float32, weights; their maxima and sums
 flash, cuDNN         D c + 4 H               instead: its output, head by head; the logarithms of the sums
dropout               2 D + H T               masks
remat dots, full      9 D c, D c              instead of all above: products and input; the input only
====================  ======================  ===========================================================

The tests compare these with what JAX saves, which is exactly this, and with XLA's analysis of compiled steps. XLA
decides the rest, so that is an estimate: which arrays exist at the same time, and what it copies.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.model import GPTConfig, Params, Remat, is_unrolled
from slm_jax.nn.axes import Axes, map_axes
from slm_jax.nn.loss import n_pieces
from slm_jax.nn.target import Target
from slm_jax.training.optimizer import muon_or_adam
from slm_jax.training.sharding import split_axis

# Measured of XLA's CPU compiler, in sizes of the gradients: Adam's moments are copied before they are updated.
_CPU_COPIES = 1.8
# In a program without loops it does some of that while activations are alive (none at 2 layers, 0.8 at 12), and it
# keeps more than JAX asks for: products beside what is made of them, and scores.
_UNROLLED_COPIES = 0.5
_UNROLLED_WIDTHS, _UNROLLED_WEIGHTS = 24, 3  # float32 arrays of a token's D, and of its H T


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device computes at a time.

    Attributes:
        cfg: the model, with the ``dtype`` and ``remat`` of the run.
        target: the kind of device.
        attention: the implementation: explicit, xla, cudnn or flash.
        rows: sequences of a micro-batch.
        seq: tokens of a row.
        n_outputs: columns of the logits: the vocabulary, or classes.
        trained_blocks: blocks with a backward pass; those before them keep nothing.
        accumulate: micro-batches of a step.
    """

    cfg: GPTConfig
    target: Target
    attention: str
    rows: int
    seq: int
    n_outputs: int
    trained_blocks: int
    accumulate: int = 1

    @property
    def unrolled(self) -> bool:
        """Whether the blocks are compiled one by one."""
        return is_unrolled(self.cfg, self.target.platform)

    @property
    def remat(self) -> Remat:
        """What is computed again: on a CPU nothing if unrolled, as the compiler finds the two computations equal."""
        return "none" if self.unrolled and self.target.platform == "cpu" else self.cfg.remat


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes on one device that last from step to step, and of the gradients.

    Attributes:
        parameters: trained and frozen.
        optimizer: the moments of what is trained, Adam's two or Muon's one.
        gradients: of what is trained.
        gathered: what a device has of the others' shares while it computes (``mesh.fsdp``).
    """

    parameters: float
    optimizer: float
    gradients: float
    gathered: float = 0.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device; not all parts are there at the same time, see ``total``.

    Attributes:
        parameters, optimizer, gradients: see :class:`State`; accumulating takes the gradients twice.
        batch: inputs, targets and weights of all micro-batches.
        activations: kept for the backward pass.
        logits: a piece's logits, the head's kernel as it is multiplied, the final norm: before the backward pass
            through the blocks.
        block: one block's activations computed again, and the gradients in it: after that.
        workspace: what the compiler is known to copy, and gathered parameters.
        total: the most at a time.
    """

    parameters: float
    optimizer: float
    gradients: float
    batch: float
    activations: float
    logits: float
    block: float
    workspace: float
    total: float


def step_memory(work: Work, state: State) -> Memory:
    """Return what a training step takes of one device."""
    tokens = work.rows * work.seq
    everything = saved_bytes(dataclasses.replace(work, cfg=dataclasses.replace(work.cfg, remat="none")))
    everything += _padding_bytes(work)
    saved = everything if work.remat == "none" else saved_bytes(work)
    activations = (saved * tokens + copied_weights(work)) * work.trained_blocks
    width, itemsize = work.cfg.emb_dim, _itemsize(work)
    logits = _logits_bytes(work) + tokens * width * (4 + 2 * itemsize) + work.n_outputs * width * itemsize
    backward = _attention_bytes(work) + _padding_bytes(work) + 12 * width * itemsize
    block = tokens * (everything - saved + backward)
    gradients = state.gradients * (1 if work.accumulate == 1 else 2)
    batch = 3 * 4 * tokens * work.accumulate
    alive = activations + max(logits, block)
    workspace, temporary = state.gathered, gradients + state.gathered + alive
    if work.target.platform == "cpu":
        copies = state.gradients * _CPU_COPIES
        workspace += copies
        early = state.gradients * _UNROLLED_COPIES if work.unrolled else 0.0
        temporary = max(temporary + early, state.gradients + copies)
    total = state.parameters + state.optimizer + batch + temporary
    return Memory(
        state.parameters, state.optimizer, gradients, batch, activations, logits, block, workspace, total=total
    )


def evaluation_memory(work: Work, state: State) -> float:
    """Return what an evaluation of ``work.rows`` sequences takes, the optimizer's state lying beside it."""
    tokens = work.rows * work.seq
    logits = _logits_bytes(work)
    block = tokens * (_attention_bytes(work) + 6 * work.cfg.emb_dim * _itemsize(work))
    return state.parameters + state.optimizer + state.gathered + 12 * tokens + max(logits, block)


def _logits_bytes(work: Work) -> float:
    """Return the bytes of a piece's float32 logits; what is made of them takes their place."""
    return 4 * work.rows * work.seq * work.n_outputs / n_pieces(work.rows, work.seq, work.n_outputs)


def saved_bytes(work: Work) -> float:
    """Return what one block keeps of one token for the backward pass: the table above."""
    width, itemsize = work.cfg.emb_dim, _itemsize(work)
    if work.remat == "full":
        return width * itemsize
    if work.remat == "dots":
        return 9 * width * itemsize
    if work.unrolled and work.target.platform == "cpu":
        return 4 * (_UNROLLED_WIDTHS * width + _UNROLLED_WEIGHTS * work.cfg.n_heads * work.seq)
    norms = 2 * (width + 1) * 4
    masks = 2 * width if work.cfg.drop_rate else 0
    return norms + 14 * width * itemsize + _attention_bytes(work) + masks


def copied_weights(work: Work) -> float:
    """Return what one block keeps of its matrices in ``dtype``, if they are stored in another."""
    if work.remat != "none" or work.cfg.dtype == work.cfg.param_dtype:
        return 0.0
    return 12 * work.cfg.emb_dim**2 * _itemsize(work)


def _attention_bytes(work: Work) -> float:
    heads = work.cfg.n_heads
    if work.attention in ("cudnn", "flash"):
        return work.cfg.emb_dim * _itemsize(work) + 4 * heads
    mask = 1 if work.cfg.drop_rate else 0
    return heads * (work.seq * (4 + _itemsize(work) + mask) + 8)


def _padding_bytes(work: Work) -> float:
    """Return what a TPU adds to a token's q, k, v and output for flash attention: 128 numbers a head."""
    if work.attention != "flash":
        return 0.0
    return 4 * work.cfg.n_heads * (-(work.cfg.emb_dim // work.cfg.n_heads) % 128) * _itemsize(work)


def _itemsize(work: Work) -> int:
    return jnp.dtype(work.cfg.dtype).itemsize


def state_bytes(trainable: Params, frozen: Params, n_shards: int = 1, muon: bool = False) -> State:
    """Return the bytes of a training state on one of ``n_shards`` devices that split it (``mesh.fsdp``).

    Args:
        trainable, frozen: trees of arrays or shapes.
        n_shards: devices that share parameters and optimizer state.
        muon: whether the blocks' matrices are Muon's (``optimizer.kind``).
    """
    trained = _tree_bytes(trainable, n_shards)
    moments = 2 * trained
    if muon:
        of_muon = jax.tree.map(
            lambda leaf, label: leaf if label == "muon" else None, trainable, muon_or_adam(trainable)
        )
        moments -= _tree_bytes(of_muon, n_shards)
    parameters = trained + _tree_bytes(frozen, n_shards)
    gathered = 0.0
    if n_shards > 1:  # one block at a time, and the embeddings
        for name, tree in {**frozen, **trainable}.items():
            layers = jax.tree.leaves(tree)[0].shape[0] if name.startswith("blocks") else 1
            gathered = max(gathered, _tree_bytes(tree, 1) / layers)
    return State(parameters, moments, trained, gathered)


def _tree_bytes(tree: Any, n_shards: int) -> float:
    def leaf_bytes(axes: Axes | None, leaf: Any) -> float:
        shards = 1 if split_axis(axes, leaf.shape, n_shards) is None else n_shards
        return leaf.size * leaf.dtype.itemsize / shards

    return sum(jax.tree.leaves(map_axes(leaf_bytes, tree)))
