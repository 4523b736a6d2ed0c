"""A dense layer whose kernel's gradient is a product of two plain matrices."""

import math
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float


def rows_times_kernel(
    x: Float[Array, "*batch_and_inputs"],
    kernel: Float[Array, "*inputs_and_outputs"],
    dimension_numbers: Any,
    precision: Any = None,
    **options: Any,
) -> Float[Array, "*batch_and_outputs"]:
    """Contract x's last axes with the kernel's first, with all rows of all sequences in one matrix.

    Over (batch, seq, features), XLA's CPU compiler would write out a transposed copy of x for the kernel's gradient,
    and recompute it from earlier activations.

    Args:
        x: (batch..., inputs...).
        kernel: (inputs..., outputs...).
        dimension_numbers: those of a dense layer; only the number of input axes is read.
        precision, options: as for `jax.lax.dot_general`.
    """
    n_axes = len(dimension_numbers[0][0])
    rows = x.reshape(-1, *x.shape[x.ndim - n_axes :])
    dimensions = ((tuple(range(1, n_axes + 1)), tuple(range(n_axes))), ((), ()))
    product = jax.lax.dot_general(rows, kernel, dimensions, precision=precision, **options)
    return product.reshape(*x.shape[: x.ndim - n_axes], *product.shape[1:])


class DenseParams(nn.Module):
    """The parameters of a dense layer by themselves, for :func:`multiply`: a kernel and a bias, or None for it."""

    features: tuple[int, ...]
    use_bias: bool
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, n_inputs: int) -> tuple[Array, Array | None]:
        """Return the kernel (n_inputs, *features) and the bias (*features)."""

        def init(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
            return self.kernel_init(key, (n_inputs, math.prod(self.features)), dtype).reshape(shape)

        kernel = self.param("kernel", init, (n_inputs, *self.features), self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, self.features, self.param_dtype)


def multiply(x: Array, kernel: Array, bias: Array | None) -> Array:
    """Return x times the kernel, contracting x's last axis with the kernel's first, plus the bias."""
    y = rows_times_kernel(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return y if bias is None else y + bias


# `features` and `axis` may be several axes, such as heads and their width; initialisers see a matrix (inputs, outputs).
Dense = partial(nn.DenseGeneral, dot_general=rows_times_kernel)
