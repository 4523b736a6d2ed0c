"""The product of hidden states with the output head, forwards and backwards."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from slm_jax.nn.target import target


def float32_logits(
    hidden: Float[Array, "batch seq emb"], kernel: Float[Array, "emb vocab"]
) -> Float[Array, "batch seq vocab"]:
    """Multiply in the hidden states' dtype and accumulate in float32: bf16 logits would round the loss away.

    The gradients' products are of the same kind. In 16 bits that has to be said, and only reverse-mode differentiation
    goes through then: left to itself, JAX multiplies the float32 gradient of float32 logits in float32, which GPUs do
    at half the speed or less, and that is a sixth of the arithmetic of training GPT-2 small.
    """
    return _product(hidden, kernel) if hidden.dtype == jnp.float32 else _product_16bit(hidden, kernel)


def _product(hidden: Array, kernel: Array) -> Array:
    return jnp.einsum("bse,ev->bsv", *operands(hidden, kernel), preferred_element_type=jnp.float32)


def operands(hidden: Array, kernel: Array) -> tuple[Array, Array]:
    """Return both in the dtype that they are multiplied in."""
    kernel = kernel.astype(hidden.dtype)
    if target().platform == "cpu":  # jax 0.7's CPU runtime has no such product; of float32 copies it is the same
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
