"""Embeddings: rows of a table, looked up by index."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from slm_jax.nn.int8 import Int8, read_int8
from slm_jax.nn.sharding import constrain


class Embedding(nn.Module):
    """A table of ``n_rows`` rows of ``width`` numbers."""

    n_rows: int
    width: int
    axis: str  # what the rows count, ``vocab`` or ``positions``
    dtype: Dtype
    param_dtype: Dtype
    embedding_init: Initializer

    def setup(self) -> None:
        """Read the parameter."""
        self.table: Any = read_int8(self)
        if self.table is None:
            shape = (self.n_rows, self.width)
            self.table = self.param("embedding", self.embedding_init, shape, self.param_dtype)

    def __call__(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq emb"]:
        """Return the rows of ``ids``.

        What other devices have of the rows' width is gathered before the look-up: after it, activations would travel.
        """
        if isinstance(self.table, Int8):
            return Int8(*(jnp.take(leaf, ids, axis=0) for leaf in self.table)).dequantize(self.dtype)
        return jnp.take(constrain(jnp.asarray(self.table, self.dtype), self.axis, None), ids, axis=0)
