"""Layer and RMS normalisation that keep little for the backward pass."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift (Ba et al. 2016); eps 1e-5 as in GPT-2.

    Computed in float32 whatever the input's dtype is, and returned in ``dtype``.
    """

    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch emb"]) -> Float[Array, "*batch emb"]:
        """Map (..., emb) to the same shape."""
        y = standardize(x.astype(jnp.float32), self.eps, True)
        y = y * self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return y.astype(self.dtype)


class RMSNorm(nn.Module):
    """Divide the last axis by its root mean square, then scale (Zhang & Sennrich 2019); no bias and no mean.

    Computed in float32 whatever the input's dtype is, and returned in ``dtype``.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch emb"]) -> Float[Array, "*batch emb"]:
        """Map (..., emb) to the same shape."""
        y = standardize(x.astype(jnp.float32), self.eps, False)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return (y * scale).astype(self.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def standardize(x: Float[Array, "*batch emb"], eps: float, centred: bool) -> Float[Array, "*batch emb"]:
    """Normalise the last axis to a mean square of 1, and if ``centred`` first to mean 0.

    The backward pass needs only the result and 1 / deviation.
    """
    return _standardize(x, eps, centred)[0]


def _standardize(x: Array, eps: float, centred: bool) -> tuple[Array, Array]:
    x = x - x.mean(axis=-1, keepdims=True) if centred else x
    inverse_std = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)
    return x * inverse_std, inverse_std


@standardize.defjvp
def _standardize_jvp(eps: float, centred: bool, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y, inverse_std = _standardize(*primals, eps, centred)
    (dx,) = tangents
    along_y = (dx * y).mean(axis=-1, keepdims=True)
    dx = dx - dx.mean(axis=-1, keepdims=True) if centred else dx
    return y, (dx - along_y * y) * inverse_std
