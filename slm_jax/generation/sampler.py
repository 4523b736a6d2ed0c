"""From logits to the next token: greedy, or sampled after the usual filters.

The filters are applied in the order of Hugging Face's transformers: repetition penalty, temperature, top-k, top-p,
min-p. Each takes float32 logits (batch, vocab) and returns them with excluded tokens at -inf.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slm_jax.errors import InputError

Number = Float[Array, ""] | np.float32 | float
Numbers = dict[str, Any]
LOWEST_TEMPERATURE = 1e-6  # below, logits / temperature overflows


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits: below 1 less random, above 1 more; 0 takes the most likely token (greedy).
        top_k: sample only from this many of the most likely tokens (Fan et al. 2018); None: from all.
        top_p: sample only from the most likely tokens whose probabilities sum to this (Holtzman et al. 2020).
        min_p: sample only from tokens with at least this share of the largest probability (Nguyen et al. 2024).
        repetition_penalty: above 1 makes tokens that the text already contains less likely (Keskar et al. 2019).

    Raises:
        InputError: a number out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(
                f"temperature is {self.temperature}; expected 0 (greedy) or at least {LOWEST_TEMPERATURE:g}"
            )
        if self.top_k is not None and (not isinstance(self.top_k, int | np.integer) or self.top_k < 1):
            raise InputError(f"top_k is {self.top_k}; expected a whole number of at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; expected 0 to 1")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; expected above 0 (1: no penalty)")

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is greedy and needs no key."""
        return self.temperature == 0

    def numbers(self) -> Numbers:
        """Return the arguments of compiled code that can change without recompiling; None if switched off."""
        top_p = None if self.top_p == 1 else self.top_p  # rounded, no sum of probabilities is exactly 1
        drawn = {"temperature": self.temperature, "top_p": top_p, "min_p": self.min_p}
        chosen = {**(dict.fromkeys(drawn) if self.is_greedy else drawn), "repetition_penalty": self.repetition_penalty}
        # Always float32: each other type would be compiled separately.
        return {name: None if value is None else np.float32(value) for name, value in chosen.items()}


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
    if top_k is not None and top_k < logits.shape[-1]:
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
