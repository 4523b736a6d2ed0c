"""Attention, one step at a time: from a weighted average without parameters to the layer that GPTModel uses.

Read it top to bottom. Each step keeps what the one before it had and adds one idea:

1. `simple_attention`: a token becomes a weighted average of all tokens; similarity is a dot product.
2. `SelfAttention`: learned projections decide what a token looks for, what it offers and what it hands over.
3. `CausalAttention`: no token sees the tokens after it, and dropout hides some of the rest during training.
4. `MultiHeadAttentionWrapper`: several of step 3 side by side.
5. `MultiHeadAttention`: the same with one matrix per role, cut into heads, and a projection that mixes them.
6. `FusedMultiHeadAttention`: step 5 in one matrix multiplication, on the fastest kernel the machine has.

Every step can hand back its attention weights (`return_weights=True`) to be drawn: row t holds how much of each
token goes into output t. They are the weights that were used, so after dropout where dropout is on.

Sources: Vaswani et al., "Attention Is All You Need" (2017), section 3.2; Raschka, "Build a Large Language Model
(From Scratch)" (2024), chapter 3, whose class and argument names are kept.
"""

import math
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import Array
from jaxtyping import Bool, Float, Int

from slm_jax.errors import InputError
from slm_jax.nn.cache import LayerCache, cached_attention
from slm_jax.nn.flash import flash_attention
from slm_jax.nn.flash import obstacle as flash_obstacle
from slm_jax.nn.layers import Dense
from slm_jax.nn.lora import Adapter
from slm_jax.nn.target import target

Implementation = Literal["auto", "xla", "cudnn", "flash", "explicit"]

# --- Step 1: attention without anything to learn ---


def simple_attention(
    x: Float[Array, "*batch seq emb"], *, return_weights: bool = False
) -> Float[Array, "*batch seq emb"] | tuple[Float[Array, "*batch seq emb"], Float[Array, "*batch seq seq"]]:
    """Replace each token by an average of all tokens, weighted by how similar they are to it.

    Similarity (the score) is the dot product of two embeddings; softmax turns a row of scores into weights that are
    positive and sum to 1. Nothing is learned: the embeddings alone decide who looks at whom.

    Args:
        x: token embeddings, (seq, emb) or with leading batch dimensions.
        return_weights: also return the weights, (..., seq, seq).

    Returns:
        The context vectors, of x's shape; with `return_weights` the pair (context vectors, weights).

    Source: book, section 3.3.
    """
    scores = x @ x.swapaxes(-1, -2)
    weights = jax.nn.softmax(scores, axis=-1)
    context = weights @ x
    return (context, weights) if return_weights else context


# --- Step 2: learned queries, keys and values ---


class SelfAttention(nn.Module):
    """Scaled dot-product attention with trainable projections; new over step 1: W_query, W_key and W_value.

    A token's query is compared with every token's key, and what is averaged is the values, so that "what I look for",
    "what I can be found by" and "what I contribute" are learned apart. Scores are divided by sqrt(d_out): a dot
    product over d_out terms grows with d_out, and large scores would leave softmax with hardly any gradient.

    Input (..., seq, d_in), output (..., seq, d_out), weights (..., seq, seq).
    Params: `query`, `key`, `value`, each with `kernel` (d_in, d_out) and, with `qkv_bias`, `bias` (d_out,).

    Source: Vaswani et al., section 3.2.1; book, section 3.4.
    """

    d_in: int
    d_out: int
    qkv_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch seq d_in"], *, return_weights: bool = False
    ) -> Float[Array, "*batch seq d_out"] | tuple[Float[Array, "*batch seq d_out"], Float[Array, "*batch seq seq"]]:
        """Return the context vectors (..., seq, d_out), or with `return_weights` the pair (context, weights)."""
        _check_width(x, self.d_in)
        queries = nn.Dense(self.d_out, use_bias=self.qkv_bias, name="query")(x)
        keys = nn.Dense(self.d_out, use_bias=self.qkv_bias, name="key")(x)
        values = nn.Dense(self.d_out, use_bias=self.qkv_bias, name="value")(x)

        scores = queries @ keys.swapaxes(-1, -2) / math.sqrt(self.d_out)
        weights = jax.nn.softmax(scores, axis=-1)
        context = weights @ values
        return (context, weights) if return_weights else context


# --- Step 3: hide the future, and drop some of the past ---


def causal_mask(seq: int) -> Bool[Array, "seq seq"]:
    """Return the lower triangle, (seq, seq): True where token t (row) may attend to token s (column), s <= t."""
    return jnp.tril(jnp.ones((seq, seq), dtype=bool))


class CausalAttention(nn.Module):
    """Self-attention in which token t sees tokens 0..t only; new over step 2: the causal mask, and dropout.

    A language model predicts the next token, so a position that could look ahead would read the answer. Scores of
    later tokens become -inf *before* softmax: exp(-inf) is exactly 0, and the rest of the row still sums to 1.
    Dropout then zeroes a share `drop_rate` of the weights in training and scales up the others to keep the mean.

    Input (..., seq, d_in) with seq <= context_length, output (..., seq, d_out), weights (..., seq, seq).
    Params as in step 2. Dropout draws from the 'dropout' rng when called with `deterministic=False`.

    Source: Vaswani et al., section 3.2.3; book, section 3.5.
    """

    d_in: int
    d_out: int
    context_length: int
    drop_rate: float
    qkv_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch seq d_in"], *, deterministic: bool = True, return_weights: bool = False
    ) -> Float[Array, "*batch seq d_out"] | tuple[Float[Array, "*batch seq d_out"], Float[Array, "*batch seq seq"]]:
        """Return the context vectors (..., seq, d_out), or with `return_weights` the pair (context, weights)."""
        _check_width(x, self.d_in)
        _check_length(x, self.context_length)
        _check_rate(self.drop_rate)
        queries = nn.Dense(self.d_out, use_bias=self.qkv_bias, name="query")(x)
        keys = nn.Dense(self.d_out, use_bias=self.qkv_bias, name="key")(x)
        values = nn.Dense(self.d_out, use_bias=self.qkv_bias, name="value")(x)

        scores = queries @ keys.swapaxes(-1, -2) / math.sqrt(self.d_out)
        scores = jnp.where(causal_mask(x.shape[-2]), scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        weights = nn.Dropout(self.drop_rate)(weights, deterministic=deterministic)
        context = weights @ values
        return (context, weights) if return_weights else context


# --- Step 4: several heads, the plain way ---


class MultiHeadAttentionWrapper(nn.Module):
    """Step 3 `n_heads` times on the same input, outputs laid end to end; new: more than one pattern of attention.

    One softmax per token can only spread one unit of attention. Heads with weights of their own can follow different
    relations at once. `d_out` is the width of *one* head here, so the output is n_heads · d_out wide.

    Input (..., seq, d_in), output (..., seq, n_heads · d_out), weights (..., n_heads, seq, seq).
    Params: `heads_0`, `heads_1`, …, each the params of a `CausalAttention`.

    Source: Vaswani et al., section 3.2.2; book, section 3.6.1.
    """

    d_in: int
    d_out: int
    context_length: int
    drop_rate: float
    n_heads: int
    qkv_bias: bool = False

    def setup(self) -> None:
        """Make the heads; Flax names them `heads_0`, `heads_1`, …."""
        self.heads = [
            CausalAttention(self.d_in, self.d_out, self.context_length, self.drop_rate, self.qkv_bias)
            for _ in range(self.n_heads)
        ]

    def __call__(
        self, x: Float[Array, "*batch seq d_in"], *, deterministic: bool = True, return_weights: bool = False
    ) -> Float[Array, "*batch seq out"] | tuple[Float[Array, "*batch seq out"], Float[Array, "*batch heads seq seq"]]:
        """Return the heads' outputs side by side, or with `return_weights` the pair (outputs, weights)."""
        outputs = [head(x, deterministic=deterministic, return_weights=True) for head in self.heads]
        context = jnp.concatenate([context for context, _ in outputs], axis=-1)
        weights = jnp.stack([weights for _, weights in outputs], axis=-3)
        return (context, weights) if return_weights else context


# --- Step 5: several heads as one tensor ---


def causal_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq heads head_dim"],
    v: Float[Array, "batch seq heads head_dim"],
    *,
    mask: Bool[Array, "#batch 1 seq seq"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch heads seq seq"]]:
    """Compute step 3 for all heads at once, as a function of queries, keys and values.

    The lines are those of `CausalAttention` with a head axis, and with care for low precision: scores and softmax are
    at least float32 whatever the inputs are, the output has the inputs' dtype.

    Args:
        q, k, v: (batch, seq, heads, head_dim).
        mask: True where attention is allowed, (batch or 1, 1, seq, seq); joined with the causal mask. Each row must
            allow at least one token that is not in the future, else its softmax is over nothing and gives NaN.
        dropout_rate: the share of weights to drop, where `dropout_key` is given.
        dropout_key: a JAX random key; None means no dropout.

    Returns:
        (context, weights): (batch, seq, heads, head_dim) and (batch, heads, seq, seq).

    Source: Vaswani et al., section 3.2, equation 1.
    """
    float32_or_wider = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=float32_or_wider) / math.sqrt(q.shape[-1])
    allowed = causal_mask(q.shape[1])
    if mask is not None:
        allowed = allowed & mask
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    if dropout_key is not None and dropout_rate > 0:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0)
    weights = weights.astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v), weights


class MultiHeadAttention(nn.Module):
    """All heads from one matrix per role; new over step 4: the split into heads, and the output projection.

    Instead of n_heads small multiplications per role there is one large one, whose result is cut along its last axis:
    columns [h · head_dim, (h + 1) · head_dim) belong to head h. `d_out` is now the width of all heads together. The
    heads know nothing of each other until `out_proj` mixes them.

    Input (batch, seq, d_in) with seq <= context_length, output (batch, seq, d_out), weights (batch, n_heads, seq, seq).
    Params: `query`, `key`, `value` as in step 2, and `out_proj` with `kernel` (d_out, d_out) and `bias` (d_out,).

    Source: Vaswani et al., section 3.2.2; book, section 3.6.2.
    """

    d_in: int
    d_out: int
    context_length: int
    drop_rate: float
    n_heads: int
    qkv_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_in"], *, deterministic: bool = True, return_weights: bool = False
    ) -> Float[Array, "batch seq d_out"] | tuple[Float[Array, "batch seq d_out"], Float[Array, "batch heads seq seq"]]:
        """Return the context vectors (batch, seq, d_out), or with `return_weights` the pair (context, weights)."""
        _check_width(x, self.d_in)
        _check_length(x, self.context_length)
        _check_rate(self.drop_rate)
        head_dim = _head_dim("d_out", self.d_out, self.n_heads)
        batch, seq, _ = x.shape

        # (batch, seq, d_out) -> (batch, seq, n_heads, head_dim): cutting the last axis moves no numbers.
        heads = (batch, seq, self.n_heads, head_dim)
        queries = nn.Dense(self.d_out, use_bias=self.qkv_bias, name="query")(x).reshape(heads)
        keys = nn.Dense(self.d_out, use_bias=self.qkv_bias, name="key")(x).reshape(heads)
        values = nn.Dense(self.d_out, use_bias=self.qkv_bias, name="value")(x).reshape(heads)

        dropping = self.drop_rate > 0 and not deterministic
        context, weights = causal_attention(
            queries,
            keys,
            values,
            dropout_rate=self.drop_rate,
            dropout_key=self.make_rng("dropout") if dropping else None,
        )
        context = nn.Dense(self.d_out, name="out_proj")(context.reshape(batch, seq, self.d_out))
        return (context, weights) if return_weights else context


# --- Step 6: the one GPTModel uses ---


class FusedMultiHeadAttention(nn.Module):
    """Step 5 made fast: one matrix for q, k and v together, and a kernel that suits the machine; same result.

    One (D, 3D) multiplication keeps an accelerator busier than three of (D, D). The attention itself goes to flash
    attention where there is one (cuDNN's on recent NVIDIA GPUs, a Pallas kernel on TPUs), which never writes the
    (seq, seq) weights to memory, and to `causal_attention` or `jax.nn.dot_product_attention` otherwise: see
    `choose_implementation`.

    Input and output (batch, seq, emb_dim), weights (batch, n_heads, seq, seq).
    Params: `qkv/kernel` (D, 3D), its columns q, k, v and within each head after head; `qkv/bias` (3D,) only with
    `qkv_bias`; `out_proj/kernel` (D, D); `out_proj/bias` (D,) only with `out_bias`.

    `dtype` is what is computed in (None: that of inputs and params), `param_dtype` what the params are kept in; the
    softmax is float32 in any case. Dropout on the weights draws from the 'dropout' rng when `deterministic=False`.

    Source: Vaswani et al., section 3.2.2; book, section 3.6.2; flash attention: Dao et al. (2022).
    """

    emb_dim: int
    n_heads: int
    drop_rate: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer = nn.initializers.lecun_normal()
    implementation: Implementation = "auto"

    @overload
    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None = ...,
        segment_ids: Array | None = ...,
        deterministic: bool = ...,
        return_weights: Literal[False] = ...,
    ) -> Array: ...
    @overload
    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None = ...,
        segment_ids: Array | None = ...,
        deterministic: bool = ...,
        return_weights: Literal[True],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(self, x: Array, *, cache: LayerCache, start: Array | None) -> tuple[Array, LayerCache]: ...

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq emb"],
        *,
        mask: Bool[Array, "#batch 1 seq seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
        return_weights: bool = False,
        cache: LayerCache | None = None,
        start: Int[Array, "batch"] | None = None,
    ) -> Float[Array, "batch seq emb"] | tuple[Float[Array, "batch seq emb"], Any]:
        """Return the layer's output (batch, seq, emb), or with `return_weights` the pair (output, weights).

        With a `cache`, which holds `start` tokens of each row, the tokens go on from those, and the result is the pair
        (output, extended cache); there is no mask, dropout or choice of implementation then.

        `segment_ids` are those of documents packed into one row: a token attends only within its own. `mask`, for
        anything else, is True where attention is allowed, and only ever takes away from what the causal mask allows.
        Whatever it says, a token may attend to itself, so that no row of weights is empty.
        """
        _check_width(x, self.emb_dim)
        _check_rate(self.drop_rate)
        head_dim = _head_dim("emb_dim", self.emb_dim, self.n_heads)
        batch, seq, _ = x.shape
        if mask is not None:
            mask = mask | jnp.eye(seq, dtype=bool)

        dense = partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        qkv = dense(3 * self.emb_dim, use_bias=self.qkv_bias, kernel_init=self.kernel_init, name="qkv")(x)
        heads = (batch, seq, self.n_heads, head_dim)
        q, k, v = (
            Adapter(name=f"{name}_adapter")(columns.reshape(heads), x, deterministic)
            for name, columns in zip("qkv", jnp.split(qkv, 3, axis=-1), strict=True)
        )

        weights = None
        if cache is not None:
            assert start is not None
            context, cache = cached_attention(q, k, v, cache, start)
        else:
            dropping = self.drop_rate > 0 and not deterministic
            chosen = choose_implementation(
                self.implementation,
                q.dtype,
                head_dim,
                needs_weights=dropping or return_weights,
                odd_mask=(mask is not None or segment_ids is not None) and seq % 2 == 1,
                other_mask=mask is not None,
            )
            if segment_ids is not None and chosen != "flash":
                within = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
                mask = within if mask is None else mask & within
            if chosen == "flash":
                context = flash_attention(q, k, v, segment_ids)
            elif chosen == "explicit":
                key = self.make_rng("dropout") if dropping else None
                context, weights = causal_attention(q, k, v, mask=mask, dropout_rate=self.drop_rate, dropout_key=key)
            else:
                context = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=chosen)

        context = context.reshape(batch, seq, self.emb_dim)
        out_proj = dense(self.emb_dim, use_bias=self.out_bias, kernel_init=self.out_kernel_init, name="out_proj")
        output = Adapter(name="out_proj_adapter")(out_proj(context), context, deterministic)
        if cache is not None:
            return output, cache
        return (output, weights) if return_weights else output


def choose_implementation(
    requested: str,
    dtype: Dtype,
    head_dim: int,
    needs_weights: bool,
    odd_mask: bool = False,
    device: tuple[str, float | None] | None = None,
    other_mask: bool = False,
) -> Literal["xla", "cudnn", "flash", "explicit"]:
    """Say how attention is to be computed; all ways give the same numbers to rounding.

    "auto" takes flash attention, cuDNN's or a TPU's, where it runs; else `causal_attention` ("explicit") on CPUs, where
    it was measured faster forward and backward (the whole layer 1.05 to 1.8 times), and jax.nn's "xla" elsewhere. Only
    "explicit" holds the weights, so dropout on them, or a wish to see them, leads there from "auto" and "xla".

    Args:
        requested: "auto", "xla", "cudnn", "flash" or "explicit".
        dtype: of queries, keys and values.
        head_dim: columns of one head.
        needs_weights: whether the weights must exist: dropout is active, or they are to be returned.
        odd_mask: whether there is an extra mask over an odd number of tokens (cuDNN has no gradient for it).
        device: (JAX's platform name, NVIDIA's compute capability or None), such as ("gpu", 8.0) or ("cpu", None);
            by default what is compiled for (:func:`slm_jax.nn.target.target`).
        other_mask: whether there is a mask that segments do not say.

    Raises:
        InputError: for an unknown name, and for a requested implementation that cannot work here.
    """
    platform, capability = target() if device is None else device
    dtype = jnp.dtype(dtype)
    obstacles = {  # why it cannot be used, and what would help
        "cudnn": _cudnn_obstacle(dtype, head_dim, odd_mask, platform, capability),
        "flash": flash_obstacle(dtype, platform),
    }
    if other_mask:
        obstacles["flash"] = "it knows no mask but that of segments; leave the mask out"
    if needs_weights:
        never = "it never forms the weights that dropout and return_weights need; set drop_rate to 0"
        obstacles = dict.fromkeys(obstacles, never)
    if requested in obstacles and obstacles[requested] is not None:
        raise InputError(
            f"attention implementation {requested!r} cannot be used: {obstacles[requested]}, or use 'auto'"
        )
    for name in ("cudnn", "flash"):
        if requested == name or (requested == "auto" and obstacles[name] is None):
            return name
    if requested == "explicit" or (requested in ("auto", "xla") and needs_weights):
        return "explicit"
    if requested == "auto":
        return "explicit" if platform == "cpu" else "xla"
    if requested != "xla":
        raise InputError(
            f"attention implementation {requested!r}, expected 'auto', 'xla', 'cudnn', 'flash' or 'explicit'"
        )
    if platform == "cpu" and dtype == jnp.float16:
        raise InputError("attention implementation 'xla' has no float16 on a CPU: use 'auto', or another dtype")
    return "xla"


def _cudnn_obstacle(dtype: Dtype, head_dim: int, odd_mask: bool, platform: str, capability: float | None) -> str | None:
    """Say why cuDNN's attention cannot be used, and what would help; None: it can."""
    if capability is None or capability < 8.0:
        here = platform if capability is None else f"compute capability {capability}"
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, and this is {here}; find such a GPU"
    if dtype not in (jnp.float16, jnp.bfloat16):
        return f"it computes in float16 or bfloat16, and this is {dtype}; set dtype to bfloat16"
    if head_dim > 128 or head_dim % 8:
        return f"it needs emb_dim / n_heads <= 128 and a multiple of 8, and this is {head_dim}; change n_heads"
    if odd_mask:
        return "it has no gradient for a mask over an odd number of tokens; make the sequence length even"
    return None


# --- What is refused ---


def _check_width(x: Array, expected: int) -> None:
    if x.shape[-1] != expected:
        raise InputError(
            f"attention input of shape {x.shape} has {x.shape[-1]} features, expected {expected}: "
            "give embeddings of that width, or build the layer for this one"
        )


def _check_length(x: Array, context_length: int) -> None:
    if x.shape[-2] > context_length:
        raise InputError(
            f"sequence of {x.shape[-2]} tokens, expected at most context_length = {context_length}: "
            "shorten the input or raise context_length"
        )


def _check_rate(drop_rate: float) -> None:
    if not 0 <= drop_rate < 1:
        raise InputError(f"drop_rate is {drop_rate}, expected 0 <= drop_rate < 1: 0 drops nothing, 0.1 is common")


def _head_dim(name: str, width: int, n_heads: int) -> int:
    if n_heads < 1 or width % n_heads:
        raise InputError(
            f"{name} = {width} cannot be cut into n_heads = {n_heads} equal heads: "
            f"choose n_heads that divides {name}, or change {name}"
        )
    return width // n_heads
