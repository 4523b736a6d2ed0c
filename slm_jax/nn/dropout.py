"""Dropout whose random numbers do not depend on how devices share a batch."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from slm_jax.nn.sharding import draw_rows


class Dropout(nn.Module):
    """Zero a share ``rate`` of the input and scale up the rest; draws from the 'dropout' rng.

    Source: Srivastava et al. 2014.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Return x; ``deterministic`` as it is."""
        if deterministic or not self.rate:
            return x
        return drop(x, self.rate, self.make_rng("dropout"))


def drop(x: Array, rate: float | Array, key: Array) -> Array:
    """Zero a share ``rate`` of ``x`` (batch first), and divide the rest by what is kept."""
    keep = 1 - rate
    kept = draw_rows(lambda shape: jax.random.bernoulli(key, keep, shape), x.shape)
    return jnp.where(kept, x / jnp.asarray(keep, x.dtype), 0)
