"""The curves of a log: what is drawn over steps, for one run or for several on the same axes."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.tools.report.html import Html, join, tag
from slm_jax.tools.report.read import Record, number
from slm_jax.tools.report.svg import COLORS, N_COLORS, new_figure, to_svg

MOST_POINTS = 500  # of a line, more than a screen shows
DASHES_IN_SVG = {"-": "none", "--": "6 3", ":": "2 3", "-.": "8 3 2 3"}
DASHES = tuple(DASHES_IN_SVG)


class Curve(NamedTuple):
    """What is drawn over steps: a split's figure, its name, its unit, and where its axis begins and ends."""

    name: str
    split: str
    key: str
    title: str
    unit: str
    low: float | None = None
    high: float | None = None


CURVES = (
    Curve("loss", "val", "loss", "loss", ""),
    Curve("bits", "val", "bits_per_byte", "bits a byte", "bits a byte"),
    Curve("accuracy", "val", "accuracy", "accuracy", "share of the validation texts", 0, 1.03),
    Curve("rate", "train", "learning_rate", "learning rate", "", 0),
    Curve("norm", "train", "grad_norm", "gradient norm", "norm before clipping", 0),
    Curve("speed", "train", "tokens_per_second", "speed", "tokens a second", 0),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a figure.

    Attributes:
        steps: where it has points.
        values: NaN is a gap.
        color: which of the page's.
        dash: how it is drawn.
        faint: whether it only stands behind others.
        dots: whether each point is marked.
        ring: whether the lowest point is ringed.
    """

    steps: np.ndarray
    values: np.ndarray
    color: int
    dash: str = "-"
    faint: bool = False
    dots: bool = False
    ring: bool = False


def draw_curves(records: Sequence[Record], prefix: str, leave_out: Sequence[str] = ()) -> Html:
    """Return a figure of each thing that is in the logs, all runs of the same task on the same axes.

    Args:
        records: the runs.
        prefix: unlike that of any other curves of the page.
        leave_out: figures that are not drawn.
    """
    figures = []
    for curve in CURVES:
        lines = [line for line in _lines(records, curve) if np.isfinite(line.values).any()]
        if lines and curve.name not in leave_out:
            svg = _draw(records, curve, lines, f"{prefix}-{curve.name}")
            figures.append(tag("figure", svg, tag("figcaption", _caption(records, curve))))
    return tag("div", *figures, class_="grid") if figures else Html("")


def _lines(records: Sequence[Record], curve: Curve) -> Iterator[Line]:
    for index, record in enumerate(records):
        color, dash = _look(index)
        if curve.name == "loss":
            yield Line(*record.points("train", "loss"), color, faint=True)
        validates = curve.split == "val"
        if validates and len(records) == 1:
            color = 1
        yield Line(*record.points(curve.split, curve.key), color, dash, dots=validates, ring=curve.name == "loss")


def _look(index: int) -> tuple[int, str]:
    """Return the colour and the dash of the lines of a run."""
    return index % N_COLORS, DASHES[index // N_COLORS % len(DASHES)]


def legend(records: Sequence[Record]) -> Html:
    """Return which line is whose."""
    items = []
    for index, record in enumerate(records):
        color, dash = _look(index)
        swatch = (
            f'<svg viewBox="0 0 32 12" aria-hidden="true"><path d="M0 6H32" stroke-dasharray="{DASHES_IN_SVG[dash]}" '
            f'style="stroke: var(--c{color}); stroke-width: 3"/></svg>'
        )
        items.append(tag("li", Html(swatch), tag("span", record.label)))
    return tag("ul", *items, class_="legend")


def _caption(records: Sequence[Record], curve: Curve) -> Html:
    strong = tag("strong", curve.title[0].upper() + curve.title[1:])
    if curve.name != "loss":
        return strong
    unit, best = f" in nats a {records[0].unit}", records[0].best()
    if len(records) > 1:
        return join([strong, f"{unit}: validation, its lowest ringed; faint: training, batch by batch"])
    parts: list[object] = [strong, unit]
    if np.isfinite(records[0].points("train", "loss")[1]).any():
        parts += [" · ", tag("span", "▬ training (one batch)", style="color: var(--c0)")]
    if best is not None:
        parts += [" · ", tag("span", "● validation (all)", style="color: var(--c1)")]
        parts += [f" · lowest {best[1]:.4f} at step {best[0]:,} (ringed)"]
    return join(parts)


def _describe(title: str, records: Sequence[Record], lines: Sequence[Line]) -> str:
    """Return the picture in words."""
    steps = max(float(line.steps[-1]) for line in lines)
    low = min(float(np.nanmin(line.values)) for line in lines)
    high = max(float(np.nanmax(line.values)) for line in lines)
    whose = "" if len(records) == 1 else f" of {len(records)} runs"
    return f"{title}{whose} over {steps:,.0f} steps, between {low:.4g} and {high:.4g}"


def _draw(records: Sequence[Record], curve: Curve, lines: Sequence[Line], name: str) -> Html:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = new_figure()
    axes = figure.axes[0]
    for line in sorted(lines, key=lambda line: not line.faint):  # those that stand behind are drawn first
        steps, values = thin_out(line.steps, line.values)
        color = COLORS[line.color]
        width, alpha = (0.8, 0.65) if line.faint else (1.5, 1)
        marker = "o" if line.dots else None
        axes.plot(steps, values, line.dash, color=color, linewidth=width, alpha=alpha, marker=marker, markersize=3)
        alone = _alone(values)
        if not line.dots and alone.any():
            axes.plot(steps[alone], values[alone], color=color, linestyle="", marker="o", markersize=3)
        if line.ring:
            lowest = np.nanargmin(values)
            axes.plot(steps[lowest], values[lowest], color=color, marker="o", markersize=8, fillstyle="none")
    last = max(1, *(record.last_step for record in records))
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.set_ylim(curve.low, curve.high)
    axes.set_xlabel("step")
    axes.set_ylabel(f"nats a {records[0].unit}" if curve.name == "loss" else curve.unit)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=axis is axes.xaxis, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(_shown))
    return to_svg(figure, name, _describe(curve.title, records, lines))


def _shown(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _alone(values: np.ndarray) -> np.ndarray:
    """Return which points have none beside them that a line could go to."""
    there = np.concatenate([[False], np.isfinite(values), [False]])
    return there[1:-1] & ~there[:-2] & ~there[2:]


def thin_out(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Leave of each stretch of a long line the first gap, the lowest and the highest point, so that none is missed."""
    if len(values) <= most:
        return steps, values
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), most // 2):
        finite = np.isfinite(values[stretch])
        if not finite.all():
            kept.add(int(stretch[~finite][0]))
        if finite.any():
            there = stretch[finite]
            kept |= {int(there[values[there].argmin()]), int(there[values[there].argmax()])}
    chosen = sorted(kept)
    return steps[chosen], values[chosen]


def not_finite(record: Record) -> int:
    """Return how many logged training steps had a loss or gradients that were not finite."""
    rows = [row for row in record.rows if row["split"] == "train"]
    keys = ("loss", "grad_norm")
    return sum(any(key in row and math.isnan(number(row[key])) for key in keys) for row in rows)


def note_not_finite(record: Record) -> Html:
    """Return a line on them; nothing where there is none."""
    count = not_finite(record)
    if not count:
        return Html("")
    text = (
        f"{record.label}: in {count:,} logged steps loss or gradients were not finite; they were skipped, and are gaps."
    )
    return tag("p", text)
