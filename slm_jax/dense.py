"""The dense layer of every projection in the transformer."""

from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float


def rows_times_kernel(
    x: Float[Array, "*batch features_in"],
    kernel: Float[Array, "features_in features_out"],
    dimension_numbers: Any,
    precision: Any = None,
    **options: Any,
) -> Float[Array, "*batch features_out"]:
    """Multiply as `jax.lax.dot_general` does, with all rows of all sequences in one matrix.

    The kernel's gradient is then a product of two plain matrices. Over (batch, seq, features), XLA's CPU compiler
    instead writes out a transposed copy of x, and computes it anew from earlier activations while it does.
    """
    del dimension_numbers  # those of a dense layer: x's last axis with the kernel's first
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), precision=precision, **options)
    return product.reshape(*x.shape[:-1], kernel.shape[1])


Dense = partial(nn.Dense, dot_general=rows_times_kernel)
