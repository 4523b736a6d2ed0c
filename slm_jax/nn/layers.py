"""What a transformer block is made of beside attention: dense layer, layer norm, GELU.

Each does what Flax's own does; how they are differentiated decides how fast a step is and how much it keeps in memory.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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

    Flax's ``Dense`` calls it with ``dimension_numbers`` that contract x's last axis with the kernel's first, and with
    ``precision`` and other ``options`` of `jax.lax.dot_general`.
    """
    del dimension_numbers  # those of a dense layer: x's last axis with the kernel's first
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), precision=precision, **options)
    return product.reshape(*x.shape[:-1], kernel.shape[1])


Dense = partial(nn.Dense, dot_general=rows_times_kernel)


class LayerNorm(nn.Module):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift (Ba et al. 2016); eps 1e-5 as GPT-2.

    Computed in float32 whatever the input is, and returned in ``dtype``.
    """

    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch emb"]) -> Float[Array, "*batch emb"]:
        """Map (..., emb) to the same shape."""
        y = standardize(x.astype(jnp.float32), self.eps)
        y = y * self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return y.astype(self.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardize(x: Float[Array, "*batch emb"], eps: float) -> Float[Array, "*batch emb"]:
    """Bring the last axis to mean 0 and variance 1, as far as ``eps`` lets it; for the backward pass keep only that."""
    return _standardize(x, eps)[0]


def _standardize(x: Array, eps: float) -> tuple[Array, Array]:
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    return centred * inverse_std, inverse_std


@standardize.defjvp
def _standardize_jvp(eps: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y, inverse_std = _standardize(*primals, eps)
    (dx,) = tangents
    along_y = (dx * y).mean(axis=-1, keepdims=True)
    return y, (dx - dx.mean(axis=-1, keepdims=True) - along_y * y) * inverse_std


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def gelu(x: Float[Array, "*shape"], exact: bool = False) -> Float[Array, "*shape"]:
    """Apply GELU (Hendrycks & Gimpel 2016), in GPT-2's tanh form or ``exact``; for the backward pass keep its slope."""
    return nn.gelu(x, approximate=not exact)


@gelu.defjvp
def _gelu_jvp(exact: bool, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,) = primals
    y, slope = jax.jvp(partial(nn.gelu, approximate=not exact), (x,), (jnp.ones_like(x),))
    return y, slope * tangents[0]
