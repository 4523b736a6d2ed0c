"""Pictures of a run. Matplotlib is imported only when one is drawn."""

from pathlib import Path
from typing import Any


def draw_loss(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss over steps into a PNG; with no finite loss there is nothing to draw.

    Args:
        rows: lines of ``metrics.jsonl``.
        path: where to write.
        title: what to write above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if row["split"] == "train" and row["loss"] is not None]
    validation = [(row["step"], row["loss"]) for row in rows if row["split"] == "val" and row["loss"] is not None]
    if not train and not validation:
        return
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ab8d9", linewidth=0.8, label="training (one batch)")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#c2410c", marker="o", markersize=3, label="validation (all)")
        best_step, best_loss = min(validation, key=lambda point: point[1])
        axes.annotate(
            f"{best_loss:.3f} at step {best_step:,}",
            (best_step, best_loss),
            textcoords="offset points",
            xytext=(-6, 10),
            ha="right",
            fontsize=8,
            color="#c2410c",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    partial = path.with_suffix(".partial.png")
    FigureCanvasAgg(figure).print_png(str(partial))
    partial.replace(path)
