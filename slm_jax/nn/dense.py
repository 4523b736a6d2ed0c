"""A dense layer whose kernel's gradient is a product of two plain matrices."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from slm_jax.nn.int8 import read_int8, times_int8


class DenseParams(nn.Module):
    """The parameters of a dense layer by themselves, for :func:`multiply`: a kernel and a bias, or None for it."""

    features: tuple[int, ...]
    use_bias: bool
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, n_inputs: int) -> tuple[Array, Array | None]:
        """Return the kernel (n_inputs, *features) and the bias (*features)."""
        return _kernel(self, (n_inputs,)), _bias(self)


class Dense(nn.Module):
    """A dense layer: the last ``n_inputs`` axes of its input times a kernel (inputs..., features...), plus a bias.

    Several axes are, for example, heads and their width; initialisers see a matrix (inputs, outputs). The kernel may be
    in 8 bits (:mod:`slm_jax.nn.int8`).
    """

    features: tuple[int, ...]
    n_inputs: int = 1
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch_and_inputs"]) -> Float[Array, "*batch_and_outputs"]:
        """Map (batch..., inputs...) to (batch..., features...)."""
        matrix = read_int8(self)
        if matrix is None:
            kernel, bias = _kernel(self, x.shape[x.ndim - self.n_inputs :]), _bias(self)
            x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
            return multiply(x, kernel, bias, self.n_inputs)
        x, bias = promote_dtype(x, _bias(self), dtype=self.dtype)
        y = times_int8(x.reshape(*x.shape[: x.ndim - self.n_inputs], -1), matrix)
        return y if bias is None else y + bias


def _kernel(layer: Any, inputs: tuple[int, ...]) -> Array:
    def init(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
        return layer.kernel_init(key, (math.prod(inputs), math.prod(layer.features)), dtype).reshape(shape)

    return layer.param("kernel", init, (*inputs, *layer.features), layer.param_dtype)


def _bias(layer: Any) -> Array | None:
    return layer.param("bias", nn.initializers.zeros, layer.features, layer.param_dtype) if layer.use_bias else None


def multiply(x: Array, kernel: Array, bias: Array | None, n_inputs: int = 1) -> Array:
    """Return x times the kernel, contracting x's last ``n_inputs`` axes with the kernel's first, plus the bias.

    All rows of all sequences are in one matrix: over (batch, seq, features), XLA's CPU compiler would write out a
    transposed copy of x for the kernel's gradient, and recompute it from earlier activations.
    """
    rows = x.reshape(-1, *x.shape[x.ndim - n_inputs :])
    y = jax.lax.dot_general(rows, kernel, ((tuple(range(1, n_inputs + 1)), tuple(range(n_inputs))), ((), ())))
    y = y.reshape(*x.shape[: x.ndim - n_inputs], *y.shape[1:])
    return y if bias is None else y + bias
