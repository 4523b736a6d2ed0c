"""How well texts are classified: accuracy, precision, recall and F1 a class, and the confusion matrix."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from slm_jax.errors import InputError
from slm_jax.training.plots import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 10  # whose matrix fits 80 columns
LONGEST_NAME = 18  # characters


@dataclasses.dataclass(frozen=True, eq=False)
class ClassFigures:
    """What a confusion matrix says.

    Attributes:
        classes: the names of the classes.
        confusion: (classes, classes), how many texts of each true class (row) got each label (column).
        accuracy: share of texts that got their own class.
        precision: a class: of the texts that got it, the share that is of it; 0 where none got it.
        recall: a class: of its texts, the share that got it; 0 where it has no text.
        f1: a class: the harmonic mean of precision and recall; 0 where both are.
        support: a class: how many texts are of it.
        macro_f1: the mean of ``f1``, each class alike.
    """

    classes: tuple[str, ...]
    confusion: Int[np.ndarray, "classes classes"]
    accuracy: float
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    support: tuple[int, ...]
    macro_f1: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data, the matrix as a list of rows."""
        by_class = {name: list(getattr(self, name)) for name in ("precision", "recall", "f1", "support")}
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "classes": list(self.classes),
            **by_class,
            "confusion": self.confusion.tolist(),
        }


def class_figures(confusion: Int[np.ndarray, "classes classes"], classes: Sequence[str]) -> ClassFigures:
    """Compute what scikit-learn's ``classification_report`` with ``zero_division=0`` says.

    Args:
        confusion: (classes, classes), how many texts of each true class (row) got each label (column).
        classes: their names.

    Raises:
        InputError: names for another number of classes; no text at all.
    """
    if len(classes) != len(confusion):
        raise InputError(
            f"{len(classes)} names of classes and a confusion matrix of {len(confusion)}; expected one name a row"
        )
    if not confusion.sum():
        raise InputError("the confusion matrix is all zeros; expected at least one text to measure on")
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
    """Divide; 0 where the whole is."""
    return part / np.maximum(whole, 1)


def class_table(figures: ClassFigures) -> str:
    """Return the figures as text of at most 80 columns; the matrix is left out where it would not fit."""
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


def draw_confusion(figures: Mapping[str, ClassFigures], path: Path, title: str) -> None:
    """Draw confusion matrices beside each other into a PNG.

    A cell holds the number of texts and their share of the true class, which is also its colour; with more than ten
    classes the colour has to do.

    Args:
        figures: by the name of the split, at least one, all of the same classes.
        path: where to write.
        title: what to write above the picture.
    """
    from matplotlib.figure import Figure

    names = _short(next(iter(figures.values())).classes)
    side, margin = min(2.2 + 0.4 * len(names), 8), 0.06 * max(map(len, names))  # inches of a panel, and of names
    size = (side * len(figures) + margin, side + margin + 1)
    figure = Figure(figsize=size, dpi=120, layout="compressed")
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for axes, (split, one) in zip(panels, figures.items(), strict=True):
        _draw_matrix(axes, one)
        axes.set_title(f"{split}: {one.accuracy:.2%} of {sum(one.support):,}", fontsize=10)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8, parse_math=False)
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [], fontsize=8, parse_math=False)
        axes.set_xlabel("predicted class")
    panels[0].set_ylabel("true class")
    figure.suptitle(title, fontsize=11, parse_math=False)
    write_png(figure, path)


def _draw_matrix(axes: "Axes", figures: ClassFigures) -> None:
    shares = _share(figures.confusion, figures.confusion.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(shares) > MOST_CLASSES:
        return
    for (row, column), share in np.ndenumerate(shares):
        axes.text(
            column,
            row,
            f"{figures.confusion[row, column]:,}\n{share:.0%}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if share > 0.5 else "black",
        )


def _short(names: Sequence[str]) -> list[str]:
    """Cut long names off, and keep each on one line."""
    names = [" ".join(name.split()) for name in names]
    return [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
