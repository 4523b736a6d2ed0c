"""How the next token is chosen."""

import dataclasses
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le

from slm_jax.config import AboveZero, NotNegative, check

LOWEST_TEMPERATURE = 1e-6  # below, logits / temperature could overflow: greedy

Numbers = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: below 1 less random, above 1 more random, 0 always the most likely token.
        top_k: sample from this many of the most likely tokens (Fan et al. 2018); 0 or null: from all.
        top_p: sample from the most likely tokens whose probabilities sum to this, above 0 to 1 (Holtzman et al. 2020);
            null: from all.
        min_p: sample from tokens with at least this share of the largest probability, 0 to 1 (Nguyen et al. 2024);
            null: from all.
        repetition_penalty: above 1 makes tokens that the text already contains less likely (Keskar et al. 2019); null:
            no penalty.
    """

    temperature: Annotated[float, Ge(0)] = 1.0
    top_k: NotNegative | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    min_p: Annotated[float, Ge(0), Le(1)] | None = None
    repetition_penalty: AboveZero | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if hasattr(value, "item"):  # a number of NumPy or JAX
                object.__setattr__(self, name, value.item())
        check(self)

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is greedy and needs no key."""
        return self.temperature < LOWEST_TEMPERATURE

    def numbers(self) -> Numbers:
        """Return the arguments of compiled code that can change without recompiling; None if switched off."""
        top_p = None if self.top_p == 1 else self.top_p  # rounded, no sum of probabilities is exactly 1
        drawn = {"temperature": self.temperature, "top_p": top_p, "min_p": self.min_p}
        chosen = {**(dict.fromkeys(drawn) if self.is_greedy else drawn), "repetition_penalty": self.repetition_penalty}
        # Always float32: each other type would be compiled separately.
        return {name: None if value is None else np.float32(value) for name, value in chosen.items()}
