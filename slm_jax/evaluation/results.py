"""What the results of evaluations share."""

import dataclasses
import math
from typing import Any


def to_dict(result: Any) -> dict[str, Any]:
    """Return a result as JSON data; NaN and infinities become null."""
    fields = dataclasses.asdict(result)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def perplexity(loss: float) -> float:
    """Return exp(loss) of a loss in nats; infinity if it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def standard_error(accuracy: float, n_examples: int) -> float:
    """Return the standard error of an accuracy; NaN for a single example."""
    return math.sqrt(accuracy * (1 - accuracy) / (n_examples - 1)) if n_examples > 1 else math.nan
