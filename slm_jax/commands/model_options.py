"""Options that several commands share: which model, and how its tokens are chosen."""

import dataclasses
from typing import TYPE_CHECKING

from slm_jax.config import Positive, Seed

if TYPE_CHECKING:
    from slm_jax.generation.sampler import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model.

    Attributes:
        run: a run's folder such as runs/tiny, or runs/tiny@800 for one of its checkpoints; or GPT-2 weights: a file,
            a folder or a name such as gpt2.
        tokenizer: gpt2, or a saved tokenizer: its file or folder, or a run's folder; null: the run's own, or GPT-2's.
        n_heads: number of attention heads, if the weights do not state it.
    """

    run: str
    tokenizer: str | None = None
    n_heads: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(ModelOptions):
    """Which model, and how its tokens are chosen.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        temperature: below 1 less random, above 1 more random, 0 always the most likely token.
        top_k: sample from this many of the most likely tokens; 0 or null: from all.
        top_p: sample from the most likely tokens whose probabilities sum to this, above 0 to 1; null: from all.
        min_p: sample from tokens with at least this share of the largest probability, 0 to 1; null: from all.
        repetition_penalty: above 1 makes tokens that the text already contains less likely; null: no penalty.
        seed: random seed.
    """

    max_new_tokens: Positive = 200
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        self.sampling()

    def sampling(self) -> "Sampling":
        """Return how tokens are chosen.

        Raises:
            InputError: a number out of range.
        """
        from slm_jax.generation.sampler import Sampling

        return Sampling(self.temperature, self.top_k or None, self.top_p, self.min_p, self.repetition_penalty)
