"""What turns hidden states into outputs: the next token's logits, and one vector a text for a classifier."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jax import Array
from jaxtyping import Float, Int

from slm_jax.nn.int8 import Int8, read_int8, times_int8
from slm_jax.nn.sharding import constrain
from slm_jax.nn.target import target

HEAD_ADAPTER = "out_head_adapter"
Pooling = Literal["last", "mean", "first"]


class OutHead(nn.Module):
    """The untied output head: hidden states to float32 logits."""

    vocab_size: int
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, hidden: Float[Array, "batch seq emb"]) -> Float[Array, "batch seq vocab"]:
        """Map (batch, seq, emb) to float32 (batch, seq, vocab_size)."""
        shape = (hidden.shape[-1], self.vocab_size)
        kernel: Any = read_int8(self)
        if kernel is None:
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        return float32_logits(hidden, kernel)


def float32_logits(
    hidden: Float[Array, "batch seq emb"], kernel: Float[Array, "emb vocab"] | Int8
) -> Float[Array, "batch seq vocab"]:
    """Multiply in the hidden states' dtype and accumulate in float32: bfloat16 logits would round the loss away.

    The products of the backward pass use the same dtypes. For 16-bit inputs this takes a custom gradient (reverse mode
    only): by default JAX would multiply the float32 gradient of float32 logits in float32, which GPUs do at half the
    speed or less, and that product is a sixth of the arithmetic of training GPT-2 small.
    """
    if isinstance(kernel, Int8):
        return times_int8(hidden, kernel, jnp.float32)
    return _product(hidden, kernel) if hidden.dtype == jnp.float32 else _product_16bit(hidden, kernel)


def _product(hidden: Array, kernel: Array) -> Array:
    logits = jnp.einsum("bse,ev->bsv", *operands(hidden, kernel), preferred_element_type=jnp.float32)
    return constrain(logits, "batch", None, "vocab")


def operands(hidden: Array, kernel: Array) -> tuple[Array, Array]:
    """Return both in the dtype in which they are multiplied."""
    kernel = kernel.astype(hidden.dtype)
    if target().platform == "cpu":  # JAX 0.7 has no such product on a CPU; float32 copies give the same result
        return hidden.astype(jnp.float32), kernel.astype(jnp.float32)
    return hidden, kernel


def head_kernel(params: Mapping[str, Any]) -> Float[Array, "emb vocab"]:
    """Return the output head's kernel from a model's params: its own, or the token embedding, transposed."""
    return params["out_head"]["kernel"] if "out_head" in params else params["tok_emb"]["embedding"].T


@jax.custom_vjp
def _product_16bit(hidden: Array, kernel: Array) -> Array:
    return _product(hidden, kernel)


def _forward(hidden: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(hidden, kernel), (hidden, kernel)


def _backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    hidden, kernel = operands(*saved)
    grad = grad.astype(hidden.dtype)
    hidden_grad = jnp.einsum("bsv,ev->bse", grad, kernel)
    kernel_grad = jnp.einsum("bse,bsv->ev", hidden, grad, preferred_element_type=jnp.float32)
    return hidden_grad.astype(saved[0].dtype), kernel_grad.astype(saved[1].dtype)


_product_16bit.defvjp(_forward, _backward)


def pool(
    hidden: Float[Array, "batch seq emb"], lengths: Int[Array, "batch"], pooling: Pooling
) -> Float[Array, "batch emb"]:
    """Reduce each text's hidden states to one vector, ignoring what lies behind its length.

    Args:
        hidden: (batch, seq, emb).
        lengths: real tokens of each row; 0 (a row that only fills up a batch) counts as 1.
        pooling: the last real token's hidden state, their mean, or the first token's.
    """
    lengths = jnp.maximum(lengths, 1)
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        return jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    real = jnp.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    return jnp.where(real, hidden, 0).sum(1) / lengths[:, None].astype(hidden.dtype)
