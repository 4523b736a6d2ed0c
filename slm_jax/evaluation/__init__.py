"""How good a model is: loss and bits per byte of a text, LAMBADA and HellaSwag in their standard scoring."""

from slm_jax.evaluation.benchmarks import HellaSwagResult, LambadaResult, hellaswag, lambada
from slm_jax.evaluation.logprobs import continuation_logprobs
from slm_jax.evaluation.results import to_dict
from slm_jax.evaluation.text import SourceLoss, TextLoss, evaluate_source, text_loss

__all__ = [
    "HellaSwagResult",
    "LambadaResult",
    "SourceLoss",
    "TextLoss",
    "continuation_logprobs",
    "evaluate_source",
    "hellaswag",
    "lambada",
    "text_loss",
    "to_dict",
]
