"""Embeddings: rows of a table, looked up by index."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from slm_jax.nn.sharding import constrain


def look_up(table: nn.Embed, ids: Int[Array, "batch seq"], axis: str) -> Float[Array, "batch seq emb"]:
    """Return the table's rows of ``ids``; ``axis`` names what they count, ``vocab`` or ``positions``.

    What other devices have of the rows' width is gathered before the look-up: after it, activations would travel.
    """
    return jnp.take(constrain(jnp.asarray(table.embedding, table.dtype), axis, None), ids, axis=0)
