"""What the evaluations' results share: figures that are always plain floats, and their JSON form."""

import dataclasses
import math
from typing import Any


def to_dict(result: Any) -> dict[str, Any]:
    """Return a result as JSON data; NaN and infinities, which JSON does not have, become null."""
    fields = dataclasses.asdict(result)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def perplexity(loss: float) -> float:
    """Return e to the power of a loss in nats; infinity where a float ends."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def standard_error(accuracy: float, n_examples: int) -> float:
    """Return the standard error of a mean of zeros and ones; NaN for a single one."""
    return math.sqrt(accuracy * (1 - accuracy) / (n_examples - 1)) if n_examples > 1 else math.nan
