"""Classes of texts: predict them, and measure accuracy, precision, recall, F1 and the confusion matrix."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from slm_jax.errors import InputError
from slm_jax.generation.decode import round_up
from slm_jax.model import GPTClassifier, Params
from slm_jax.pictures import own_style, write_png
from slm_jax.tokenizer import Tokenizer

MOST_CLASSES = 10  # of a confusion matrix that fits 80 columns
LONGEST_NAME = 18  # characters


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A classifier's prediction for a text: the most likely class, and the probability of each."""

    label: str
    probability: float  # of the label
    probabilities: dict[str, float]
    truncated: bool  # whether the text is longer than the classifier's max_length


class Classifier:
    """Predicts classes of texts: ``classifier(["a text", "another"])[0].label``.

    It computes in float32 on every device, so that a text's probabilities don't depend on its batch (≤1e-6). It reads
    the first ``max_length`` tokens of a text, as in training.
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

        self._probabilities = jax.jit(probabilities)  # compiled once per width of a batch

    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> list[Prediction]:
        """Predict the class of each of any number of texts, in their order.

        Raises:
            InputError: one text instead of a list of texts; a text that is empty or that the tokenizer cannot encode.
        """
        from slm_jax.data.labelled import classification_eval_batches, encode_text  # imports Grain: 0.8 s

        if isinstance(texts, str):
            raise InputError(f"texts is {texts!r:.60}; expected a list of texts, even for a single one")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"a text is {text!r:.60}; expected text that is not empty")
        encoded = [encode_text(text, self._tokenizer) for text in texts]
        if not encoded:
            return []
        batches = classification_eval_batches(
            [ids[: self.max_length] for ids in encoded],
            np.arange(len(encoded), dtype=np.int32),  # index of the text, in place of its label
            batch_size=round_up(len(encoded), 1, batch_size),
            limit=self.max_length,
            bucketed=True,
        )
        rows = np.zeros((len(encoded), len(self.classes)), np.float32)
        for batch in batches:
            real = batch["weights"] > 0
            found = self._probabilities(self._params, batch["inputs"], batch["lengths"])
            rows[batch["labels"][real]] = np.asarray(found)[real]
        predictions = []
        for row, ids in zip(rows, encoded, strict=True):
            probabilities = dict(zip(self.classes, row.tolist(), strict=True))
            label = max(probabilities, key=probabilities.__getitem__)
            truncated = len(ids) > self.max_length
            predictions.append(Prediction(label, probabilities[label], probabilities, truncated))
        return predictions


@dataclasses.dataclass(frozen=True, eq=False)
class ClassFigures:
    """Figures of a confusion matrix, as in scikit-learn's ``classification_report`` with ``zero_division=0``.

    ``support`` is the number of texts of each class, ``confusion`` (classes, classes) the number of texts by true class
    (row) and predicted class (column).
    """

    accuracy: float
    macro_f1: float
    classes: tuple[str, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    support: tuple[int, ...]
    confusion: Int[np.ndarray, "classes classes"]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data, the matrix as a list of rows."""
        return {**vars(self), "confusion": self.confusion.tolist()}


def class_figures(confusion: Int[np.ndarray, "classes classes"], classes: Sequence[str]) -> ClassFigures:
    """Compute the figures of a confusion matrix, which is not all zero."""
    assert len(classes) == len(confusion), classes
    assert confusion.any(), "no texts"
    right, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = _share(2 * right, support + predicted)
    return ClassFigures(
        classes=tuple(classes),
        confusion=confusion,
        accuracy=float(right.sum() / confusion.sum()),
        precision=tuple(_share(right, predicted).tolist()),
        recall=tuple(_share(right, support).tolist()),
        f1=tuple(f1.tolist()),
        support=tuple(support.tolist()),
        macro_f1=float(f1.mean()),
    )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)  # 0 where the whole is 0


def class_table(figures: ClassFigures) -> str:
    """Return the figures as text of at most 80 columns; the matrix is left out if it doesn't fit."""
    names = [f"{i} {name}" for i, name in enumerate(_short(figures.classes))]
    width = max(len(name) for name in names)
    lines = [f"{'':{width}}  precision  recall      F1  texts"]
    rows = zip(names, figures.precision, figures.recall, figures.f1, figures.support, strict=True)
    lines += [f"{name:{width}}  {p:9.4f}  {r:6.4f}  {f1:6.4f}  {n:5d}" for name, p, r, f1, n in rows]
    lines += ["", f"accuracy {figures.accuracy:.4f}, macro F1 {figures.macro_f1:.4f}", ""]
    if len(names) > MOST_CLASSES:
        return "\n".join([*lines, f"(the confusion matrix of {len(names)} classes is too wide to show here)"])
    digits = max(len(str(count)) for count in figures.confusion.flat)
    lines += ["true class (row) and predicted class (column), number of texts"]
    lines += [f"{'':{width}} " + "".join(f" {i:{digits}d}" for i in range(len(names)))]
    for name, counts in zip(names, figures.confusion, strict=True):
        lines.append(f"{name:{width}} " + "".join(f" {count:{digits}d}" for count in counts))
    return "\n".join(lines)


@own_style()
def draw_confusion(figures: Mapping[str, ClassFigures], path: Path, title: str) -> None:
    """Draw confusion matrices of splits, by name, with the same classes, side by side into a PNG.

    A cell shows the number of texts and, also as its colour, their share of the true class; with more than ten
    classes only the colour.
    """
    from matplotlib.figure import Figure

    names = _short(next(iter(figures.values())).classes)
    side, margin = min(2.2 + 0.4 * len(names), 8), 0.06 * max(map(len, names))  # inches of a panel and of the names
    size = (side * len(figures) + margin, side + margin + 1)
    figure = Figure(figsize=size, dpi=120, layout="compressed")
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for axes, (split, one) in zip(panels, figures.items(), strict=True):
        shares = _share(one.confusion, one.confusion.sum(axis=1, keepdims=True))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares) if len(names) <= MOST_CLASSES else ():
            text, color = f"{one.confusion[row, column]:,}\n{share:.0%}", "white" if share > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
        axes.set_title(f"{split}: {one.accuracy:.2%} of {sum(one.support):,}", fontsize=10)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8, parse_math=False)
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [], fontsize=8, parse_math=False)
        axes.set_xlabel("predicted class")
    panels[0].set_ylabel("true class")
    figure.suptitle(title, fontsize=11, parse_math=False)
    write_png(figure, path)


def _short(names: Sequence[str]) -> list[str]:
    names = [" ".join(name.split()) for name in names]
    return [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
