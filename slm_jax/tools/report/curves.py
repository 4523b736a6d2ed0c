"""The curves of a log over steps, of one run or of several on the same axes."""

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slm_jax.tools.report.record import Record

COLORS = ("#1f6fb4", "#c2410c", "#2e7d32", "#8a3fb0", "#92700a", "#0b7a80", "#b42a66", "#5a6270")
INK = "#45505e"
# An <img> cannot read the page's colours; in dark mode the style sheet inverts the whole picture.
_STYLE: Any = {
    "font.size": 11.0,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "path.simplify_threshold": 1.0,  # units of which 72 are an inch: a long line has no more points than a screen
    "svg.fonttype": "none",
    "svg.hashsalt": "slm-jax",
}


class Curve(NamedTuple):
    """A split's figure over steps: its name in the log, title, unit, and the limits of its axis."""

    split: str
    key: str
    title: str
    unit: str
    low: float | None = None
    high: float | None = None


CURVES = (
    Curve("val", "loss", "Loss", ""),
    Curve("val", "bits_per_byte", "Bits a byte", "bits a byte"),
    Curve("val", "accuracy", "Accuracy", "share of the validation texts", 0, 1.03),
    Curve("train", "learning_rate", "Learning rate", "", 0),
    Curve("train", "grad_norm", "Gradient norm", "norm before clipping", 0),
    Curve("train", "tokens_per_second", "Speed", "tokens a second", 0),
)


class Line(NamedTuple):
    """A line of a figure; NaN in its values is a gap; one of validation has each point marked."""

    steps: np.ndarray
    values: np.ndarray
    color: str
    dash: str
    faint: bool
    validation: bool


def draw_curves(records: Sequence[Record], bits: bool) -> list[dict[str, Any]]:
    """Return the picture of each figure of runs of one task as ``{title, src, alt}``.

    ``bits`` adds bits per byte, which compare models of different tokenizers.
    """
    drawn = []
    for curve in CURVES:
        lines = [line for line in _lines(records, curve) if np.isfinite(line.values).any()]
        if lines and (bits or curve.key != "bits_per_byte"):
            alt = _describe(curve.title.lower(), len(records), lines)
            drawn.append({"title": curve.title, "src": _draw(records, curve, lines), "alt": alt})
    return drawn


def look(index: int) -> tuple[str, str]:
    """Return colour and dash of a run's lines."""
    return COLORS[index % len(COLORS)], ("-", "--", ":", "-.")[index // len(COLORS) % 4]


def _lines(records: Sequence[Record], curve: Curve) -> list[Line]:
    lines = []
    for index, record in enumerate(records):
        color, dash = look(index)
        validation = curve.split == "val"
        if curve.key == "loss":
            lines.append(Line(*record.points("train", "loss"), color, "-", True, False))
        if validation and len(records) == 1:
            color = COLORS[1]
        lines.append(Line(*record.points(curve.split, curve.key), color, dash, False, validation))
    return sorted(lines, key=lambda line: not line.faint)


def _describe(title: str, n_runs: int, lines: Sequence[Line]) -> str:
    steps = max(line.steps[-1] for line in lines)
    low, high = min(np.nanmin(line.values) for line in lines), max(np.nanmax(line.values) for line in lines)
    of = "" if n_runs == 1 else f" of {n_runs} runs"
    return f"{title}{of} over {steps:,.0f} steps, between {low:.4g} and {high:.4g}"


def _draw(records: Sequence[Record], curve: Curve, lines: Sequence[Line]) -> str:
    """Return a figure as the data URL of an SVG; equal figures have equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(400 / 72, 250 / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _plot(axes, line, ring=curve.key == "loss" and not line.faint)
        last = max(1, *(record.last_step for record in records))
        axes.set(xlim=(-0.02 * last, 1.02 * last), ylim=(curve.low, curve.high), xlabel="step")
        axes.set_ylabel(f"nats a {records[0].unit}" if curve.key == "loss" else curve.unit)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=axis is axes.xaxis, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(FuncFormatter(format_tick))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()


def _plot(axes: Any, line: Line, ring: bool) -> None:
    steps, values = line.steps, line.values
    finite = np.concatenate([[False], np.isfinite(values), [False]])
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]  # no line leads to these points
    marks = np.ones(len(values), bool) if line.validation else alone
    width, alpha = (0.8, 0.65) if line.faint else (1.5, 1)
    axes.plot(steps, values, line.dash, color=line.color, linewidth=width, alpha=alpha)
    axes.plot(steps[marks], values[marks], "o", color=line.color, markersize=3)
    if ring:
        lowest = np.nanargmin(values)
        axes.plot(steps[lowest], values[lowest], "o", color=line.color, markersize=8, fillstyle="none")


def format_tick(value: float, _position: int | None = None) -> str:
    """Return a short label of an axis."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
