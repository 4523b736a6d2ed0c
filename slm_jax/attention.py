"""Attention, one step at a time: from a weighted average without parameters to several heads at once.

Read it top to bottom. Each step keeps what the one before it had and adds one idea:

1. `simple_attention`: a token becomes a weighted average of all tokens; similarity is a dot product.
2. `SelfAttention`: learned projections decide what a token looks for, what it offers and what it passes on.
3. `CausalAttention`: no token sees the tokens after it, and dropout hides some of the rest during training.
4. `MultiHeadAttentionWrapper`: several of step 3 side by side.
5. `MultiHeadAttention`: the same with one matrix per role, cut into heads, and a projection that mixes them.

The layer that GPTModel uses, :class:`slm_jax.nn.fused_attention.FusedMultiHeadAttention`, is step 5 on the fastest
kernel that the machine has.

Every step can return its attention weights (`return_weights=True`) to be drawn: row t holds how much of each
token goes into output t. They are the weights that were used, so after dropout where dropout is on.

Sources: Vaswani et al., "Attention Is All You Need" (2017), section 3.2; Raschka, "Build a Large Language Model
(From Scratch)" (2024), chapter 3, whose class and argument names are kept.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float

from slm_jax.nn.dropout import drop

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
        _check(x, self.d_in)
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
        _check(x, self.d_in, context_length=self.context_length, drop_rate=self.drop_rate)
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
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    *,
    mask: Bool[Array, "#batch 1 seq seq"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch heads seq seq"]]:
    """Compute step 3 for all heads at once, as a function of queries, keys and values.

    The lines are those of `CausalAttention` with a head axis, and with care for low precision: scores and softmax are
    at least float32 whatever the inputs are, the output has the inputs' dtype.

    Args:
        q: (batch, seq, heads, head_dim).
        k, v: (batch, seq, kv_heads, head_dim). With fewer of them than heads, each serves as many neighbouring heads
            (grouped-query attention, Ainslie et al. 2023).
        mask: True where attention is allowed, (batch or 1, 1, seq, seq); joined with the causal mask. Each row must
            allow at least one token that is not in the future, else its softmax is over nothing and gives NaN.
        dropout_rate: the share of weights to drop, where `dropout_key` is given.
        dropout_key: a JAX random key; None means no dropout.

    Returns:
        (context, weights): (batch, seq, heads, head_dim) and (batch, heads, seq, seq).

    Source: Vaswani et al., section 3.2, equation 1.
    """
    float32_or_wider = jnp.promote_types(q.dtype, jnp.float32)
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # The heads that share keys and values are computed like further tokens of one head.
    q = q.reshape(batch, seq, kv_heads, -1, head_dim).transpose(0, 3, 1, 2, 4).reshape(batch, -1, kv_heads, head_dim)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=float32_or_wider) / math.sqrt(head_dim)
    scores = scores.reshape(batch, heads, seq, seq)
    allowed = causal_mask(seq)
    if mask is not None:
        allowed = allowed & mask
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    if dropout_key is not None and dropout_rate > 0:
        weights = drop(weights, dropout_rate, dropout_key)
    weights = weights.astype(v.dtype)
    context = jnp.einsum("bhqk,bkhd->bqhd", weights.reshape(batch, kv_heads, -1, seq), v)
    context = context.reshape(batch, -1, seq, kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    return context.reshape(batch, seq, heads, head_dim), weights


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
        _check(
            x,
            self.d_in,
            context_length=self.context_length,
            drop_rate=self.drop_rate,
            d_out=self.d_out,
            n_heads=self.n_heads,
        )
        batch, seq, _ = x.shape

        # (batch, seq, d_out) -> (batch, seq, n_heads, head_dim): cutting the last axis moves no numbers.
        heads = (batch, seq, self.n_heads, self.d_out // self.n_heads)
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


# --- Checks of the inputs ---


def _check(
    x: Array, width: int, *, context_length: int | None = None, drop_rate: float = 0.0, d_out: int = 1, n_heads: int = 1
) -> None:
    if x.shape[-1] != width:
        raise ValueError(f"attention input of shape {x.shape} has {x.shape[-1]} features, expected {width}")
    if context_length is not None and x.shape[-2] > context_length:
        raise ValueError(f"sequence of {x.shape[-2]} tokens, expected at most context_length = {context_length}")
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}, expected 0 <= drop_rate < 1")
    if n_heads < 1 or d_out % n_heads:
        raise ValueError(f"d_out is {d_out}, expected a multiple of n_heads = {n_heads}")
