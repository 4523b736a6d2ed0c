"""Multi-head attention as GPTModel uses it: step 5 of :mod:`slm_jax.attention` on the machine's fastest kernel."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import Array
from jaxtyping import Bool, Float, Int

from slm_jax.attention import causal_attention
from slm_jax.errors import InputError
from slm_jax.nn.architecture import AttentionKind
from slm_jax.nn.cache import LayerCache, cached_attention
from slm_jax.nn.dense import Dense, DenseParams, multiply
from slm_jax.nn.flash import flash_attention, flash_obstacle
from slm_jax.nn.lora import Adapter
from slm_jax.nn.norms import RMSNorm
from slm_jax.nn.rope import Rotation, rotate
from slm_jax.nn.sharding import attend_on_each_device, constrain, free_axes, splits
from slm_jax.nn.target import target


class FusedMultiHeadAttention(nn.Module):
    """Multi-head attention with the same result as :class:`slm_jax.attention.MultiHeadAttention`, faster.

    Attention goes to flash attention where it is available (cuDNN's on recent NVIDIA GPUs, a Pallas kernel on TPUs),
    which never writes the (seq, seq) weights to memory, and otherwise to `causal_attention` or
    `jax.nn.dot_product_attention`: see `choose_implementation`. The softmax is always float32.

    Input and output (batch, seq, emb_dim), weights (batch, n_heads, seq, seq).
    Params: `q`, `k` and `v` have a `kernel` (emb_dim, n_heads, head_dim) and, with `qkv_bias`, a `bias` (n_heads,
    head_dim), `k` and `v` with n_kv_heads; `out_proj` has a `kernel` (n_heads, head_dim, emb_dim) and, with `out_bias`,
    a `bias` (emb_dim,). With `qk_norm`, `q_norm` and `k_norm` have a `scale` (head_dim,).

    Source: Vaswani et al. 2017, section 3.2.2; the book's section 3.6.2; flash attention: Dao et al. 2022; fewer heads
    of keys and values: Ainslie et al. 2023.

    Attributes:
        emb_dim: width of input and output.
        n_kv_heads: heads of keys and values, each for a group of heads; divides n_heads; None: as many.
        head_dim: width of a head; None: emb_dim / n_heads.
        qk_norm: whether queries and keys are normalised in each head, before they are rotated.
        norm_eps: added to their mean square.
        drop_rate: dropout on the attention weights, from the 'dropout' rng with `deterministic=False`.
        dtype: dtype of the computation; None: that of inputs and params.
        kernel_init: initialiser of the query, key and value kernels, each seen as (emb_dim, n_heads · head_dim).
        implementation: see `choose_implementation`.
    """

    emb_dim: int
    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-5
    drop_rate: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer = nn.initializers.lecun_normal()
    implementation: AttentionKind = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq emb"],
        *,
        rotation: Rotation | None = None,
        mask: Bool[Array, "#batch 1 seq seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
        return_weights: bool = False,
        cache: LayerCache | None = None,
        start: Int[Array, "batch"] | None = None,
    ) -> Any:
        """Compute the layer's output.

        Args:
            x: (batch, seq, emb_dim).
            rotation: angles by which queries and keys are rotated (:func:`slm_jax.nn.rope.rotation`).
            mask: True where attention is allowed, (batch or 1, 1, seq, seq); joined with the causal mask. A token may
                always attend to itself, so that no row of weights is empty.
            segment_ids: documents packed into one row; a token attends only within its own.
            deterministic: False applies dropout.
            return_weights: also return the weights, (batch, n_heads, seq, seq).
            cache: keys and values of earlier tokens, which these tokens follow; without mask, dropout or a choice of
                implementation.
            start: number of tokens of each row in the cache.

        Returns:
            The output (batch, seq, emb_dim); with `return_weights` (output, weights), with a cache (output, cache).

        Raises:
            InputError: the implementation cannot be used here.
        """
        assert x.shape[-1] == self.emb_dim, (x.shape, self.emb_dim)
        # Where the devices do not divide the heads of keys and values, each computes all heads.
        axes = ("batch", None, "heads" if splits("kv_heads", self.n_kv_heads or self.n_heads) else None, None)
        q, k, v = (
            constrain(Adapter(name=f"{name}_adapter")(product, x, deterministic), *axes)
            for name, product in zip(
                "qkv", self._project(x, one_token=cache is not None and x.shape[1] == 1), strict=True
            )
        )
        if self.qk_norm:
            q, k = (
                RMSNorm(x.dtype, self.param_dtype, self.norm_eps, name=f"{name}_norm")(x)
                for name, x in (("q", q), ("k", k))
            )
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        extra: Any
        if cache is not None:
            assert start is not None
            context, extra = cached_attention(q, k, v, cache, start)
        else:
            dropout_key = self.make_rng("dropout") if self.drop_rate > 0 and not deterministic else None
            context, extra = self._attend(q, k, v, mask, segment_ids, dropout_key, return_weights)
        out_proj = Dense(
            (self.emb_dim,),
            n_inputs=2,
            use_bias=self.out_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.out_kernel_init,
            name="out_proj",
        )
        output = Adapter(name="out_proj_adapter")(out_proj(context), context, deterministic)
        return (output, extra) if cache is not None or return_weights else output

    def _project(self, x: Array, one_token: bool) -> list[Array]:
        """Return queries (batch, seq, n_heads, head_dim), and keys and values (batch, seq, n_kv_heads, head_dim).

        One product with all three kernels side by side trains faster than three products (by 3% of a step of nanoGPT's
        CPU recipe). For a single token, the copy that puts them side by side would cost 8% of a decoding step.
        They lie side by side in each head of keys and values, so that a mesh that splits the heads moves nothing.
        """
        n_kv_heads, width = self.n_kv_heads or self.n_heads, self.head_dim or self.emb_dim // self.n_heads
        if self.has_variable("params", "qkv"):  # as slm_jax.nn.int8.quantize makes it
            features = ((self.n_heads + 2 * n_kv_heads) * width,)
            dense = Dense(features, use_bias=self.qkv_bias, dtype=self.dtype, param_dtype=self.param_dtype, name="qkv")
            return jnp.split(dense(x).reshape(*x.shape[:2], -1, width), [self.n_heads, self.n_heads + n_kv_heads], 2)
        weights = [
            leaf
            for name, n_heads in (("q", self.n_heads), ("k", n_kv_heads), ("v", n_kv_heads))
            for leaf in DenseParams((n_heads, width), self.qkv_bias, self.param_dtype, self.kernel_init, name=name)(
                self.emb_dim
            )
        ]
        x, *weights = promote_dtype(x, *weights, dtype=self.dtype)
        kernels: list[Any] = weights[0::2]
        biases: list[Any] = weights[1::2]
        whole = free_axes(("tensor",)) and not splits("kv_heads", n_kv_heads)
        if one_token or whole:
            return [multiply(x, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)]

        @jax.checkpoint  # the backward pass puts the kernels side by side again instead of keeping the copy
        def fused(x: Array, kernels: list[Any], biases: list[Any]) -> list[Array]:
            def side_by_side(leaves: list[Any]) -> Array:
                return jnp.concatenate([leaf.reshape(*leaf.shape[:-2], n_kv_heads, -1) for leaf in leaves], axis=-1)

            product = multiply(x, side_by_side(kernels), side_by_side(biases) if self.qkv_bias else None)
            q, k, v = jnp.split(product, [product.shape[-1] - 2 * width, product.shape[-1] - width], axis=-1)
            return [q.reshape(*q.shape[:2], self.n_heads, width), k, v]

        return fused(x, kernels, biases)

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        segment_ids: Array | None,
        dropout_key: Array | None,
        return_weights: bool,
    ) -> tuple[Array, Array | None]:
        """Return the context, shaped like ``q``, and the weights if the chosen implementation has them."""
        seq = q.shape[1]
        chosen = choose_implementation(
            self.implementation,
            q.dtype,
            q.shape[-1],
            needs_weights=dropout_key is not None or return_weights,
            odd_mask=(mask is not None or segment_ids is not None) and seq % 2 == 1,
            other_mask=mask is not None,
        )
        if chosen == "flash":
            return flash_attention(q, k, v, segment_ids), None
        if mask is not None:
            mask = mask | jnp.eye(seq, dtype=bool)
        if segment_ids is not None:
            within = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            mask = within if mask is None else mask & within
        if chosen == "explicit":
            return causal_attention(q, k, v, mask=mask, dropout_rate=self.drop_rate, dropout_key=dropout_key)

        def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
            return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=chosen)

        return (attend_on_each_device(attend, q, k, v, mask) if chosen == "cudnn" else attend(q, k, v, mask)), None


def choose_implementation(
    requested: str,
    dtype: Dtype,
    head_dim: int,
    needs_weights: bool,
    odd_mask: bool = False,
    device: tuple[str, float | None] | None = None,
    other_mask: bool = False,
) -> Literal["xla", "cudnn", "flash", "explicit"]:
    """Choose how attention is computed; every implementation gives the same numbers up to rounding.

    "auto" takes flash attention (cuDNN's or a TPU's) where it runs; else `causal_attention` ("explicit") on CPUs, where
    the whole layer was measured 1.05 to 1.8 times faster forward and backward, and jax.nn's "xla" elsewhere. Only
    "explicit" forms the weights, so "auto" and "xla" fall back to it if there is dropout or the weights are returned.

    Args:
        requested: an :data:`slm_jax.nn.architecture.AttentionKind`.
        dtype: dtype of queries, keys and values.
        head_dim: width of one head.
        needs_weights: whether the weights must exist: dropout is active, or they are returned.
        odd_mask: whether there is an extra mask over an odd number of tokens (cuDNN has no gradient for it).
        device: (JAX's platform name, NVIDIA's compute capability or None), such as ("gpu", 8.0) or ("cpu", None);
            default: what is compiled for (:func:`slm_jax.nn.target.target`).
        other_mask: whether there is a mask other than that of segments.

    Raises:
        InputError: an unknown name, or a requested implementation that cannot work here.
    """
    platform, capability = target() if device is None else device
    dtype = jnp.dtype(dtype)
    obstacles = {
        "cudnn": _cudnn_obstacle(dtype, head_dim, odd_mask, platform, capability),
        "flash": flash_obstacle(dtype, platform),
    }
    if other_mask:
        obstacles["flash"] = "it supports no mask but that of segments"
    if needs_weights:
        obstacles = dict.fromkeys(obstacles, "it never forms the weights, which dropout and return_weights need")
    if obstacle := obstacles.get(requested):
        raise InputError(f"attention implementation {requested!r} cannot be used: {obstacle}; expected 'auto'")
    for name in ("cudnn", "flash"):
        if requested == name or (requested == "auto" and obstacles[name] is None):
            return name
    if requested == "explicit" or (requested in ("auto", "xla") and needs_weights):
        return "explicit"
    if requested == "auto":
        return "explicit" if platform == "cpu" else "xla"
    if requested != "xla":
        names = ", ".join(map(repr, get_args(AttentionKind)))
        raise InputError(f"attention implementation is {requested!r}; expected one of {names}")
    if platform == "cpu" and dtype == jnp.float16:
        raise InputError("attention implementation 'xla' has no float16 on a CPU; expected 'auto' or another dtype")
    return "xla"


def _cudnn_obstacle(dtype: Dtype, head_dim: int, odd_mask: bool, platform: str, capability: float | None) -> str | None:
    """Return why cuDNN's attention cannot be used; None if it can."""
    if capability is None or capability < 8.0:
        here = platform if capability is None else f"compute capability {capability}"
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, and this is {here}"
    if dtype not in (jnp.float16, jnp.bfloat16):
        return f"it needs float16 or bfloat16, and dtype is {dtype}"
    if head_dim > 128 or head_dim % 8:
        return f"it needs a head_dim (emb_dim / n_heads) of at most 128 and a multiple of 8, and this is {head_dim}"
    if odd_mask:
        return "it has no gradient for a mask over an odd number of tokens"
    return None
