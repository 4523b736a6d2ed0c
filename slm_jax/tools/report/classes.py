"""How a classifier does: figures of each split, and the confusion matrix of the test texts."""

import numpy as np

from slm_jax.tools.report.html import Html, details, scrolled, table, tag
from slm_jax.tools.report.read import LAST_STEP, Record, Row, figure, listed, number

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
    last = record.measured(moments[-1], "test")
    too_many = len(_names(last)) > MOST_CLASSES
    parts.append(_too_many(record, len(_names(last))) if too_many else _matrices(record, "test", moments))
    parts.append(_by_class(last, "test texts, " + _when(moments[-1])))
    if not too_many:
        others = [_matrices(record, split, moments) for split in SPLITS[1:]]
        parts.append(details("Validation and training texts", *others))
    return parts


def _too_many(record: Record, n_classes: int) -> Html:
    drawn = (record.folder.path / "confusion.png").is_file() and not record.went_on
    where = "; confusion.png has that of the test texts" if drawn else ""
    return tag("p", f"Matrices of {n_classes} classes are too large here{where}.")


def _when(moment: str) -> str:
    return "after training" if moment == "after" else "before training"


def _splits(record: Record, moments: list[str]) -> Html:
    names = {"loss": ".4f", "accuracy": ".2%", "macro_f1": ".4f"}
    called = {"macro_f1": "macro F1"}
    head = ["split", "texts", *(f"{called.get(name, name)} {moment}" for name in names for moment in moments)]
    rows = []
    for split in SPLITS:
        figures = [record.measured(moment, split) for moment in moments]
        texts = sum(map(number, listed(figures[-1].get("support"))))
        cells = [figure(one.get(name), form, "–") for name, form in names.items() for one in figures]
        rows.append([split, figure(texts, ",.0f", "–"), *cells])
    return table(head, rows, numbers=range(1, len(head)))


def _by_class(figures: Row, caption: str) -> Html:
    columns = [_names(figures), *(listed(figures.get(name)) for name in ("precision", "recall", "f1", "support"))]
    if not all(columns):
        return Html("")
    rows = [
        [name, *(figure(value, ".4f", "–") for value in values[:3]), figure(values[3], ",.0f", "–")]
        for name, *values in zip(*columns, strict=False)
    ]
    return table(["class", "precision", "recall", "F1", "texts"], rows, numbers=(1, 2, 3, 4), caption=caption)


def _matrices(record: Record, split: str, moments: list[str]) -> Html:
    made = [_matrix(record.measured(moment, split), f"{split} texts, {_when(moment)}") for moment in moments]
    return tag("div", *made, class_="grid")


def _matrix(figures: Row, caption: str) -> Html:
    """Return a confusion matrix; the share of its true class is the colour of a cell."""
    classes = _names(figures)
    counts = _counts(figures.get("confusion"), len(classes))
    if counts is None:
        return Html("")
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


def _names(figures: Row) -> list[str]:
    """Return the names of the classes; none where one of them is no text."""
    names = listed(figures.get("classes"))
    return names if all(isinstance(name, str) for name in names) else []


def _counts(confusion: object, n_classes: int) -> np.ndarray | None:
    """Return a confusion matrix; None where it is none of so many classes."""
    rows = [[number(count) for count in listed(row)] for row in listed(confusion)]
    if not rows or [len(row) for row in rows] != [n_classes] * n_classes:
        return None
    counts = np.array(rows)
    whole = (counts >= 0) & (counts <= LAST_STEP) & (counts == np.rint(counts))
    return counts.astype(np.int64) if whole.all() else None
