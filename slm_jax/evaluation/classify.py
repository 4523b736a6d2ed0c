"""The classes of texts, told by a run that was fine-tuned for it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from slm_jax.classifier import GPTClassifier
from slm_jax.errors import InputError, MissingInputError
from slm_jax.generation.decode import round_up
from slm_jax.model import Params
from slm_jax.runs import find_checkpoint, read_checkpoint
from slm_jax.tokenizer import Tokenizer, tokenizer_from_dict


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a classifier says of a text.

    Attributes:
        label: the likeliest class.
        probability: of that class.
        probabilities: of every class; they sum to 1.
        truncated: whether the text is longer than what the classifier reads, so that its end was not looked at.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    truncated: bool


class Classifier:
    """Tells the classes of texts: ``classifier(["a text", "another"])[0].label``.

    It computes in float32 on every device, so that a text's probabilities do not depend on those beside it (≤1e-6).

    Attributes:
        classes: their names.
        max_length: tokens of a text that are read, as in training.
    """

    def __init__(
        self, model: GPTClassifier, params: Params, tokenizer: Tokenizer, classes: tuple[str, ...], max_length: int
    ):
        self.classes = classes
        self.max_length = max_length
        self._params = params
        self._tokenizer = tokenizer

        def probabilities(
            params: Params, inputs: Int[Array, "batch seq"], lengths: Int[Array, "batch"]
        ) -> Float[Array, "batch classes"]:
            with jax.default_matmul_precision("highest"):
                return jax.nn.softmax(model.apply({"params": params}, inputs, lengths))  # type: ignore[arg-type]

        self._probabilities = jax.jit(probabilities)  # compiled once for each width of a batch

    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> list[Prediction]:
        """Return a prediction for each text, in their order.

        Args:
            texts: any number; what is longer than ``max_length`` tokens is cut off there.
            batch_size: texts computed at a time.

        Raises:
            InputError: one text instead of a list of them; a text that is empty or that the tokenizer cannot encode; a
                ``batch_size`` below 1.
        """
        from slm_jax.data.text_batches import classification_eval_batches, encode_text  # Grain takes most of a second

        if isinstance(texts, str):
            raise InputError(f"texts is {texts!r:.60}; expected a list of texts, even for a single one")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"a text is {text!r:.60}; expected text that is not empty")
        encoded = [encode_text(text, self._tokenizer) for text in texts]
        if not encoded:
            return []
        batches = classification_eval_batches(
            [ids[: self.max_length] for ids in encoded],
            np.arange(len(encoded), dtype=np.int32),  # not classes: which text a row is, as rows are sorted by length
            batch_size=round_up(len(encoded), 1, batch_size),
            limit=self.max_length,
            bucketed=True,
        )
        rows = np.zeros((len(encoded), len(self.classes)), np.float32)
        for batch in batches:
            real = batch["weights"] > 0
            found = self._probabilities(self._params, batch["inputs"], batch["lengths"])
            rows[batch["labels"][real]] = np.asarray(found)[real]
        return [self._prediction(row, len(ids) > self.max_length) for row, ids in zip(rows, encoded, strict=True)]

    def _prediction(self, row: Float[np.ndarray, " classes"], truncated: bool) -> Prediction:
        probabilities = dict(zip(self.classes, row.tolist(), strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        return Prediction(label, probabilities[label], probabilities, truncated)


def load_classifier(source: str | Path, step: int | str = "best") -> Classifier:
    """Load what ``slm-jax finetune`` made of a model with ``task: classification``.

    Args:
        source: a run such as ``runs/classify_builtin``, or ``runs/classify_builtin@800`` with the step.
        step: a step, ``"best"`` (the lowest validation loss) or ``"latest"``.

    Returns:
        What is called with a list of texts and gives a :class:`Prediction` for each.

    Raises:
        MissingInputError: no run there, or no checkpoint of that step.
        InputError: a run that is no classifier; a damaged checkpoint; a step that is none.
    """
    checkpoint = find_checkpoint(source, step)
    if checkpoint is None:
        raise MissingInputError(f"{source}: no run with checkpoints there; expected one such as runs/classify_builtin")
    cfg, params, metadata = read_checkpoint(*checkpoint, "float32", classifier=True)
    classes = tuple(metadata["classes"])
    model = GPTClassifier(cfg, n_classes=len(classes), pooling=metadata["pooling"])
    tokenizer = tokenizer_from_dict(metadata["tokenizer"])
    return Classifier(model, params, tokenizer, classes, metadata["max_length"])
