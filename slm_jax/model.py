"""The decoder as Flax modules: transformer block, the whole model, and a classifier made of it.

By default it is GPT-2; the fields of :class:`GPTConfig` that differ in Llama and Qwen3 are in
:mod:`slm_jax.nn.architecture`, with the presets.
The parameters are a plain nested dict, whose axes :mod:`slm_jax.nn.axes` names. All blocks are stacked: every leaf
under ``blocks`` has the layer as its first axis, and one block's code is applied along it (``flax.linen.scan``). How
the stack is executed (as a loop, unrolled, rematerialised or in consecutive segments) never changes that tree.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from slm_jax.errors import InputError
from slm_jax.nn.architecture import (
    PRESETS,
    AttentionKind,
    DType,
    GPTConfig,
    Preset,
    Remat,
    axis_sizes,
    get_gpt_config,
)
from slm_jax.nn.axes import STACK, Params, count
from slm_jax.nn.blocks import segment_lengths
from slm_jax.nn.cache import KVCache, LayerCache
from slm_jax.nn.dropout import Dropout
from slm_jax.nn.embedding import Embedding
from slm_jax.nn.fused_attention import FusedMultiHeadAttention
from slm_jax.nn.heads import OutHead, Pooling, float32_logits, pool
from slm_jax.nn.int8 import Int8
from slm_jax.nn.lora import Adapter
from slm_jax.nn.mlp import FeedForward
from slm_jax.nn.norms import LayerNorm, RMSNorm
from slm_jax.nn.rope import Rotation, rotation
from slm_jax.nn.sharding import constrain
from slm_jax.nn.target import target

__all__ = [
    "PRESETS",
    "AttentionKind",
    "DType",
    "GPTClassifier",
    "GPTConfig",
    "GPTModel",
    "Params",
    "Preset",
    "Remat",
    "TransformerBlock",
    "axis_sizes",
    "count_params",
    "get_gpt_config",
    "init_cache",
    "init_classifier",
    "init_params",
    "is_unrolled",
    "param_shapes",
]

INIT_STD = 0.02  # GPT-2's standard deviation for every weight matrix


def _norm(cfg: GPTConfig, name: str | None = None) -> nn.Module:
    options: dict[str, Any] = {
        "dtype": cfg.dtype, "param_dtype": cfg.param_dtype, "eps": cfg.norm_eps, "name": name,
    }  # fmt: skip
    return RMSNorm(**options) if cfg.norm == "rmsnorm" else LayerNorm(use_bias=cfg.bias, **options)


class TransformerBlock(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x)), dropout on both branches."""

    cfg: GPTConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq emb"],
        cache: LayerCache | None,
        start: Int[Array, "batch"] | None,
        angles: Rotation | None,
        segment_ids: Int[Array, "batch seq"] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch seq emb"], LayerCache | None]:
        """Map (batch, seq, emb) to the same shape; the second result is the block's cache, extended, if it has one."""
        cfg = self.cfg
        dtypes: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
        # GPT-2 scales down the initial values of the 2 · n_layers projections that are summed into the stream.
        inits: dict[str, Any] = {
            "kernel_init": nn.initializers.normal(INIT_STD),
            "out_kernel_init": nn.initializers.normal(INIT_STD / math.sqrt(2 * cfg.n_layers)),
        }
        dropout = Dropout(cfg.drop_rate)
        attention = FusedMultiHeadAttention(
            emb_dim=cfg.emb_dim,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_kv_heads,
            head_dim=cfg.head_dim,
            qk_norm=cfg.qk_norm,
            norm_eps=cfg.norm_eps,
            drop_rate=cfg.drop_rate,
            qkv_bias=cfg.qkv_bias and cfg.bias,
            out_bias=cfg.bias,
            implementation=cfg.attention,
            name="attn",
            **dtypes,
            **inits,
        )
        feed_forward = FeedForward(
            axis_sizes(cfg)["mlp"],
            use_bias=cfg.bias,
            exact_gelu=cfg.exact_gelu,
            gated=cfg.mlp == "swiglu",
            name="ff",
            **dtypes,
            **inits,
        )
        normed = _norm(cfg, "norm1")(x)
        if cache is None:
            attended = attention(normed, rotation=angles, segment_ids=segment_ids, deterministic=deterministic)
        else:
            attended, cache = attention(normed, rotation=angles, cache=cache, start=start)
        x = constrain(x + dropout(attended, deterministic), "batch", None, None)
        normed = _norm(cfg, "norm2")(x)
        x = x + dropout(feed_forward(normed, deterministic), deterministic)
        return constrain(x, "batch", None, None), cache


def init_cache(cfg: GPTConfig, params: Params, batch_size: int, capacity: int) -> KVCache:
    """Make an empty cache of keys and values for ``batch_size`` rows of up to ``capacity`` tokens.

    It has the same segments of blocks as ``params`` (arrays or shapes).

    Returns:
        Zeros in ``cfg.dtype``: ``keys`` and ``values`` (blocks, kv_heads·batch_size, capacity, head_dim) for each
        segment; ``lengths``, int32 (batch_size,), counts the tokens in each row.

    Raises:
        InputError: a capacity below 1 or beyond the model's context.
    """
    if not 1 <= capacity <= cfg.context_length:
        raise InputError(f"a cache of {capacity} tokens; expected 1 to the model's context of {cfg.context_length}")

    blocks = {
        name: LayerCache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))
        for name, shape in _cache_shapes(cfg, segment_lengths(params), batch_size, capacity).items()
    }
    return KVCache(blocks, jnp.zeros(batch_size, jnp.int32))


def _cache_shapes(
    cfg: GPTConfig, segments: Mapping[str, int], batch_size: int, capacity: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of the keys, and of the values, of each segment of blocks."""
    sizes = axis_sizes(cfg)
    return {
        name: (n_blocks, batch_size * sizes["kv_heads"], capacity, sizes["head_dim"])
        for name, n_blocks in segments.items()
    }


class GPTModel(nn.Module):
    """A decoder-only transformer (Radford et al. 2019; the book's chapter 4).

    ``GPTModel(cfg).init(key, tokens)["params"]`` makes the parameters; ``apply({"params": params}, tokens)`` gives
    float32 logits (batch, seq, vocab_size). ``apply(..., method="hidden")`` stops after the final norm, and
    ``apply({"params": params}, hidden, method="logits")`` resumes from there. Training with dropout takes
    ``deterministic=False`` and ``rngs={"dropout": key}``.

    The params may also have the stack of blocks in consecutive segments (:func:`slm_jax.nn.blocks.split_blocks`);
    segments in front of the first one that is differentiated then have no backward pass.
    """

    cfg: GPTConfig

    def setup(self) -> None:
        """Create the submodules; their attribute names are the top level of the params tree."""
        cfg = self.cfg
        init = nn.initializers.normal(INIT_STD)
        embed: dict[str, Any] = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype, "embedding_init": init}
        self.tok_emb = Embedding(cfg.vocab_size, cfg.emb_dim, "vocab", **embed)
        if cfg.positions == "learned":
            self.pos_emb = Embedding(cfg.context_length, cfg.emb_dim, "positions", **embed)
        self.drop = Dropout(cfg.drop_rate)
        self.final_norm = _norm(cfg)
        if not cfg.tie_weights:
            self.out_head = OutHead(cfg.vocab_size, cfg.param_dtype, init)
            self.out_head_adapter = Adapter()
        segments = segment_lengths(self.variables.get("params", {})) or {STACK: cfg.n_layers}
        for name, length in segments.items():
            setattr(self, name, _block_stack(cfg, length))
        self.segments = segments

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
        cache: KVCache | None = None,
    ) -> Float[Array, "batch seq vocab"] | tuple[Float[Array, "batch seq vocab"], KVCache]:
        """Compute the logits of the token after each position.

        Args:
            tokens: int32 (batch, seq), every id below ``vocab_size`` (ids are not checked on the device).
            positions: of the tokens in their text; default 0, 1, 2 …, counted on from the cache's lengths.
            segment_ids: documents packed into one row; a token attends only within its own.
            deterministic: False applies dropout.
            cache: keys and values of earlier tokens (:func:`init_cache`), which these tokens follow. ``cache.lengths``
                + seq must not exceed its capacity (not checked on the device).

        Returns:
            float32 (batch, seq, vocab_size); with a cache (logits, the cache extended by these tokens).

        Raises:
            InputError: more tokens than ``context_length`` or the cache's capacity; a cache together with
                ``segment_ids`` or dropout.
        """
        options: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids, "deterministic": deterministic}
        if cache is None:
            return self.logits(self.hidden(tokens, **options), deterministic=deterministic)
        hidden, cache = self.hidden(tokens, cache=cache, **options)
        return self.logits(hidden), cache

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
        cache: KVCache | None = None,
    ) -> Any:
        """Compute the hidden states after the final norm, (batch, seq, emb_dim); arguments as for the whole model.

        With a cache the result is (hidden, cache).

        Raises:
            InputError: tokens or a cache that the model cannot take, as for the whole model.
        """
        seq = tokens.shape[1]
        _check_tokens_fit(self.cfg, tokens.shape, cache, self.segments)
        if cache is not None and (segment_ids is not None or (self.cfg.drop_rate and not deterministic)):
            raise InputError("a cache is for generation: expected no segment_ids with it, and deterministic=True")
        if positions is None:
            positions = jnp.arange(seq)[None, :] + (0 if cache is None else cache.lengths[:, None])
        x, angles = self.tok_emb(tokens), None
        if self.cfg.positions == "learned":
            x = x + self.pos_emb(positions)
        else:
            angles = rotation(self.cfg, positions)
        x = constrain(self.drop(x, deterministic), "batch", None, None)
        if cache is None:
            for name in self.segments:
                x, _ = getattr(self, name)(x, None, None, angles, segment_ids, deterministic)
            return self.final_norm(x)
        blocks = {}
        for name in self.segments:
            x, blocks[name] = getattr(self, name)(x, cache.blocks[name], cache.lengths, angles, None, True)
        return self.final_norm(x), KVCache(blocks, cache.lengths + seq)

    def logits(
        self, hidden: Float[Array, "batch seq emb"], *, deterministic: bool = True
    ) -> Float[Array, "batch seq vocab"]:
        """Map hidden states (batch, seq, emb_dim) to float32 logits (batch, seq, vocab_size)."""
        if self.cfg.tie_weights:
            table = self.tok_emb.table
            return float32_logits(hidden, table if isinstance(table, Int8) else table.T)
        return self.out_head_adapter(self.out_head(hidden), hidden, deterministic)


def _check_tokens_fit(
    cfg: GPTConfig, shape: tuple[int, ...], cache: KVCache | None, segments: Mapping[str, int]
) -> None:
    batch, seq = shape
    if seq > cfg.context_length:
        raise InputError(f"{seq} tokens; expected at most the model's context_length of {cfg.context_length}")
    if cache is None:
        return
    rows, capacity = len(cache.lengths), jax.tree.leaves(cache.blocks)[0].shape[-2]
    if batch != rows:
        raise InputError(f"{batch} rows of tokens and a cache for {rows}; expected as many")
    if seq > capacity:
        raise InputError(f"{seq} tokens; expected at most the cache's capacity of {capacity}")
    shapes = {name: layer.keys.shape for name, layer in cache.blocks.items()}
    if shapes != _cache_shapes(cfg, segments, rows, capacity):
        found = f"the cache has the segments {', '.join(shapes)} and the params {', '.join(segments)}"
        raise InputError(f"{found}, or it is for another shape of model; expected init_cache(cfg, params, ...)")


def is_unrolled(cfg: GPTConfig, platform: str) -> bool:
    """Return whether the blocks are compiled one by one for a ``platform``; by default on "cpu", where that is faster.

    Not with ``remat``: in an unrolled program, XLA's CPU compiler merges the recomputation with the forward pass.
    """
    return platform == "cpu" and cfg.remat == "none" if cfg.unroll is None else cfg.unroll


def _block_stack(cfg: GPTConfig, length: int) -> nn.Module:
    """Build ``length`` blocks whose parameters are stacked along axis 0."""
    unroll = is_unrolled(cfg, target().platform)
    block: Any = TransformerBlock
    if cfg.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == "dots" else None
        # Inside a loop the compiler cannot merge the recomputation with the forward pass; unrolled it could.
        block = nn.remat(block, policy=policy, prevent_cse=unroll, static_argnums=(6,))
    stack = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *(nn.broadcast,) * 4),
        length=length,
        unroll=length if unroll else 1,
    )
    return stack(cfg)


def init_params(cfg: GPTConfig, key: jax.Array) -> Params:
    """Make a model's parameters in ``param_dtype``; under ``jax.jit`` they are placed as they are made."""
    return GPTModel(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def param_shapes(cfg: GPTConfig) -> Params:
    """Return the params tree as shapes and dtypes, without making any array."""
    # The configured attention may be for another machine, as in a plan.
    return jax.tree.map(lambda leaf: leaf, _param_shapes(dataclasses.replace(cfg, attention="auto")))


@functools.cache  # a model is traced in a fifth of a second, and its shapes are asked for often
def _param_shapes(cfg: GPTConfig) -> Params:
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def count_params(cfg: GPTConfig) -> int:
    """Count a model's parameters, a tied head once."""
    return count(param_shapes(cfg))


class GPTClassifier(GPTModel):
    """A GPT with a classification head; its params tree is the GPT's, with ``class_head`` for ``out_head``.

    ``GPTClassifier(cfg, n_classes=2).apply({"params": params}, tokens, lengths)`` gives float32 logits
    (batch, n_classes). The head is one linear layer, with a bias unless ``cfg.bias`` is False, on one vector a text,
    which ``pooling`` makes of the hidden states: the last real token's, their mean, or the first token's. Padding
    behind a text's length is ignored.

    Source: the book's chapter 6, which takes the last token.
    """

    n_classes: int = 2
    pooling: Pooling = "last"

    def setup(self) -> None:
        """Create the submodules."""
        super().setup()
        init = nn.initializers.normal(INIT_STD)
        self.class_head = nn.Dense(
            self.n_classes, use_bias=self.cfg.bias, kernel_init=init, param_dtype=self.cfg.param_dtype
        )
        self.class_head_adapter = Adapter()

    def __call__(  # type: ignore[override]
        self, tokens: Int[Array, "batch seq"], lengths: Int[Array, "batch"], *, deterministic: bool = True
    ) -> Float[Array, "batch classes"]:
        """Compute the logits of the classes.

        Args:
            tokens: int32 (batch, seq), padded on the right with any ids.
            lengths: real tokens of each row, at least 1.
            deterministic: False applies dropout.

        Returns:
            float32 (batch, n_classes).

        Raises:
            InputError: more tokens than ``context_length``.
        """
        hidden = self.hidden(tokens, deterministic=deterministic)
        pooled = pool(hidden.astype(jnp.float32), lengths, self.pooling)
        return self.class_head_adapter(self.class_head(pooled), pooled, deterministic)


def init_classifier(model: GPTClassifier, key: jax.Array) -> Params:
    """Return new parameters."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))["params"]
