"""How a classifier does: figures of each split, and the confusion matrix of the test texts."""

import numpy as np

from slm_jax.report.html import Html, details, scrolled, table, tag
from slm_jax.report.read import Record, Row, figure

MOST_CLASSES = 30  # whose matrix is shown
SPLITS = ("test", "validation", "train")


def classes_section(record: Record) -> list[Html]:
    """Return tables of accuracy, of each class, and of what was taken for what; nothing where there is none."""
    if record.task != "classification":
        return []
    moments = [moment for moment in ("before", "after") if record.measured(moment, "test")]
    if not moments:
        return [tag("p", "Measured before the first step and when the run ends.", class_="dim")]
    parts = [_splits(record, moments)]
    parts += [_matrices(record, "test", moments)]
    last = record.measured(moments[-1], "test")
    parts += [_by_class(last, "test texts, " + _when(moments[-1]))]
    others = [_matrices(record, split, moments) for split in SPLITS[1:]]
    return [*parts, details("Validation and training texts", *others)]


def _when(moment: str) -> str:
    return "after training" if moment == "after" else "before training"


def _splits(record: Record, moments: list[str]) -> Html:
    names = {"loss": ".4f", "accuracy": ".2%", "macro_f1": ".4f"}
    called = {"macro_f1": "macro F1"}
    head = ["split", "texts", *(f"{called.get(name, name)} {moment}" for name in names for moment in moments)]
    rows = []
    for split in SPLITS:
        figures = [record.measured(moment, split) for moment in moments]
        texts = sum(_counts(figures[-1].get("support")))
        cells = [figure(one.get(name), form, "–") for name, form in names.items() for one in figures]
        rows.append([split, f"{texts:,}", *cells])
    return table(head, rows, numbers=range(1, len(head)))


def _counts(values: object) -> list[int]:
    return [int(value) for value in values if isinstance(value, int)] if isinstance(values, list) else []


def _by_class(figures: Row, caption: str) -> Html:
    columns = [figures.get(name) for name in ("classes", "precision", "recall", "f1", "support")]
    if not all(isinstance(column, list) for column in columns):
        return Html("")
    rows = [
        [name, *(figure(value, ".4f", "–") for value in values[:3]), f"{values[3]:,}"]
        for name, *values in zip(*columns, strict=False)
    ]
    return table(["class", "precision", "recall", "F1", "texts"], rows, numbers=(1, 2, 3, 4), caption=caption)


def _matrices(record: Record, split: str, moments: list[str]) -> Html:
    made = [_matrix(record.measured(moment, split), f"{split} texts, {_when(moment)}") for moment in moments]
    return tag("div", *made, class_="grid")


def _matrix(figures: Row, caption: str) -> Html:
    """Return a confusion matrix; the share of its true class is the colour of a cell."""
    classes = [str(name) for name in figures.get("classes") or []]
    try:
        counts = np.array(figures.get("confusion"), np.int64).reshape(len(classes), len(classes))
    except (TypeError, ValueError):
        return Html("")
    if not classes or len(classes) > MOST_CLASSES:
        return tag("p", f"{caption}: a matrix of {len(classes)} classes is too large here; see confusion.png.")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = [tag("th", "true ↓, predicted →"), *(tag("th", name, scope="col") for name in classes)]
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(
                tag("td", f"{count:,}", tag("small", f"{share:.0%}"), style=f"--share: {share:.3f}")
                for count, share in zip(counts[i], shares[i], strict=True)
            ),
        )
        for i, name in enumerate(classes)
    ]
    content = [tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *rows)]
    return scrolled(tag("table", *content, class_="matrix"), caption)
