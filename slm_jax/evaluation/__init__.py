"""How good a model is.

Loss and bits per byte of a text, LAMBADA and HellaSwag in their standard scoring, classes of texts, and responses to
instructions against references.
"""

from slm_jax.evaluation.benchmarks import HellaSwagResult, LambadaResult, hellaswag, lambada
from slm_jax.evaluation.classes import ClassFigures, class_figures, class_table, draw_confusion
from slm_jax.evaluation.logprobs import continuation_logprobs
from slm_jax.evaluation.responses import (
    ReferenceLoss,
    Response,
    ResponseScores,
    exact_match,
    read_responses,
    reference_loss,
    rouge_l,
    score_responses,
)
from slm_jax.evaluation.results import to_dict
from slm_jax.evaluation.text import SourceLoss, TextLoss, evaluate_source, text_loss

__all__ = [
    "ClassFigures",
    "HellaSwagResult",
    "LambadaResult",
    "ReferenceLoss",
    "Response",
    "ResponseScores",
    "SourceLoss",
    "TextLoss",
    "class_figures",
    "class_table",
    "continuation_logprobs",
    "draw_confusion",
    "evaluate_source",
    "exact_match",
    "hellaswag",
    "lambada",
    "read_responses",
    "reference_loss",
    "rouge_l",
    "score_responses",
    "text_loss",
    "to_dict",
]
