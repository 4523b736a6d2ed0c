"""From logits to the next token: greedy, or drawn after the usual filters.

The filters come in the order that Hugging Face's transformers has them: repetition penalty, temperature, top-k, top-p,
min-p. Each takes float32 logits (batch, vocab) and returns them with what must not be drawn at -inf.
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
LOWEST_TEMPERATURE = 1e-6  # logits over less than that are infinite


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits: below 1 safer, above 1 wilder; 0 takes the likeliest token (greedy).
        top_k: draw only from this many of the likeliest tokens (Fan et al. 2018); None: from all.
        top_p: draw only from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        min_p: draw only from tokens at least this share as likely as the likeliest (Nguyen et al. 2024).
        repetition_penalty: above 1 makes tokens that are already in the text less likely (Keskar et al. 2019).

    Raises:
        InputError: a number outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(
                f"temperature is {self.temperature}; expected 0 (greedy) or above, at least {LOWEST_TEMPERATURE:g}"
            )
        if self.top_k is not None and (not isinstance(self.top_k, int | np.integer) or self.top_k < 1):
            raise InputError(f"top_k is {self.top_k}; expected a whole number of at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected above 0 and at most 1, or None for all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; expected 0 to 1, or None for all tokens")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; expected above 0; 1 is none")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn, so that no key is needed."""
        return self.temperature == 0

    def numbers(self) -> Numbers:
        """Return what compiled code takes as values, so that a change compiles nothing; None where switched off."""
        top_p = None if self.top_p == 1 else self.top_p  # all of them: no sum of probabilities is exactly 1
        drawn = {"temperature": self.temperature, "top_p": top_p, "min_p": self.min_p}
        chosen = {**(dict.fromkeys(drawn) if self.is_greedy else drawn), "repetition_penalty": self.repetition_penalty}
        # Of one type: Python's int and float, and NumPy's, would each be compiled for.
        return {name: None if value is None else np.float32(value) for name, value in chosen.items()}


def choose_tokens(
    logits: Float[Array, "batch vocab"],
    numbers: Numbers,
    top_k: int | None,
    keys: jax.Array | None,
    seen: Bool[Array, "batch vocab"] | None,
) -> Int[Array, "batch"]:
    """Choose one id a row.

    Args:
        logits: float32 (batch, vocab).
        numbers: :meth:`Sampling.numbers`; without a temperature the choice is greedy.
        top_k: :attr:`Sampling.top_k`.
        keys: (batch,), one a row, so that a row's draw does not depend on the others; None if greedy.
        seen: the tokens that each row has, for the repetition penalty.
    """
    if seen is not None:
        logits = penalize_repetition(logits, seen, numbers["repetition_penalty"])
    if numbers["temperature"] is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / numbers["temperature"]
    ids = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = jax.lax.top_k(logits, top_k)  # what follows then has only these to look at
    if numbers["top_p"] is not None:
        logits = keep_top_p(logits, numbers["top_p"])
    if numbers["min_p"] is not None:
        logits = keep_min_p(logits, numbers["min_p"])
    chosen = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)  # type: ignore[arg-type]
    return chosen if ids is None else jnp.take_along_axis(ids, chosen[:, None], axis=1)[:, 0]


def penalize_repetition(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: Number
) -> Float[Array, "batch vocab"]:
    """Divide the positive logits of tokens that were seen by the penalty, and multiply the negative ones."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_p(logits: Float[Array, "batch vocab"], p: Number) -> Float[Array, "batch vocab"]:
    """Keep the fewest of the likeliest tokens that together have probability ``p``, at least one.

    Halves the interval of the smallest probability that is kept: sorting a vocabulary takes many times as long on a
    CPU (GPT-2's for 8 rows: 75 ms instead of 3).
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
    """Keep tokens whose probability is at least ``share`` of the likeliest one's."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(share), -jnp.inf, logits)
