"""From logits to the next token: greedy, or sampled after the usual filters.

The filters are applied in the order of Hugging Face's transformers: repetition penalty, temperature, top-k, top-p,
min-p. Each takes float32 logits (batch, vocab) and returns them with excluded tokens at -inf.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slm_jax.generation.config import Numbers

Number = Float[Array, ""] | np.float32 | float


def choose_tokens(
    logits: Float[Array, "batch vocab"],
    numbers: Numbers,
    top_k: int | None,
    keys: jax.Array | None,
    seen: Bool[Array, "batch vocab"] | None,
) -> Int[Array, "batch"]:
    """Choose one id per row, greedily if ``numbers`` (of :meth:`Sampling.numbers`) have no temperature.

    Each row has its own key, so that its draw does not depend on the others; ``seen``: the tokens that each row
    contains, for the repetition penalty.
    """
    if seen is not None:
        logits = penalize_repetition(logits, seen, numbers["repetition_penalty"])
    if numbers["temperature"] is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / numbers["temperature"]
    ids = None
    if top_k and top_k < logits.shape[-1]:
        logits, ids = jax.lax.top_k(logits, top_k)  # the following filters only process these
    if numbers["top_p"] is not None:
        logits = keep_top_p(logits, numbers["top_p"])
    if numbers["min_p"] is not None:
        logits = keep_min_p(logits, numbers["min_p"])
    chosen = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)  # type: ignore[arg-type]
    return chosen if ids is None else jnp.take_along_axis(ids, chosen[:, None], axis=1)[:, 0]


def penalize_repetition(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: Number
) -> Float[Array, "batch vocab"]:
    """Divide positive logits of tokens in ``seen`` by the penalty, and multiply negative ones."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_p(logits: Float[Array, "batch vocab"], p: Number) -> Float[Array, "batch vocab"]:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least ``p``.

    Bisects the smallest probability that is kept: sorting is 25 times slower on a CPU (GPT-2's vocabulary, 8 rows:
    75 ms instead of 3 ms).
    """
    probabilities = jax.nn.softmax(logits, axis=-1)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(probabilities >= middle, probabilities, 0), axis=-1, keepdims=True) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    most = probabilities.max(axis=-1, keepdims=True)
    least, _ = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(most), most))
    return jnp.where(probabilities < least, -jnp.inf, logits)


def keep_min_p(logits: Float[Array, "batch vocab"], share: Number) -> Float[Array, "batch vocab"]:
    """Keep tokens whose probability is at least ``share`` of the largest."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(share), -jnp.inf, logits)
