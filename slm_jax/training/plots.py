"""The loss curves of a run. Matplotlib is imported only when they are drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_jax.files import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING, VALIDATION, ACCURACY = "#9ab8d9", "#c2410c", "#4d7c0f"


def draw_loss(rows: list[dict[str, Any]], path: Path, title: str, unit: str = "nats a token") -> None:
    """Draw training and validation loss by step into a PNG file; without a finite loss write none.

    The rows are lines of ``metrics.jsonl``. The validation accuracy, if there is one, has its own axis on the right.
    """
    from matplotlib.figure import Figure

    train, validation = _points(rows, "train", "loss"), _points(rows, "val", "loss")
    if not train and not validation:
        return
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAINING, linewidth=0.8, label="training (one batch)")
    if validation:
        axes.plot(*zip(*validation, strict=True), color=VALIDATION, marker="o", markersize=3, label="validation (all)")
        best_step, best_loss = min(validation, key=lambda point: point[1])
        axes.annotate(
            f"{best_loss:.3f} at step {best_step:,}",
            (best_step, best_loss),
            textcoords="offset points",
            xytext=(-6, 10),
            ha="right",
            fontsize=8,
            color=VALIDATION,
        )
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.25)
    lines = axes.get_lines() + _draw_accuracy(axes, _points(rows, "val", "accuracy"))
    figure.legend(handles=lines, frameon=False, loc="outside lower center", ncols=len(lines), fontsize=9)
    write_png(figure, path)


def _points(rows: list[dict[str, Any]], split: str, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row["split"] == split and row.get(key) is not None]


def _draw_accuracy(axes: "Axes", points: list[tuple[int, float]]) -> list[Any]:
    """Draw accuracy on a second axis; return the lines of it, for the legend."""
    if not points:
        return []
    right = axes.twinx()
    right.set_ylabel("accuracy")
    right.set_ylim(0, 1.02)
    return right.plot(
        *zip(*points, strict=True),
        color=ACCURACY,
        linestyle="--",
        marker="s",
        markersize=3,
        label="validation accuracy",
    )
