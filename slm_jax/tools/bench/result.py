"""What was measured: as JSON, as a table, as a picture."""

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from slm_jax.files import unwritable, write_png
from slm_jax.tools.bench.ceilings import Ceilings
from slm_jax.training.summary import environment

MEASURED, BOUND = "#c2410c", "#9ab8d9"


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        what: the kind: train, generate, data, startup or memory.
        config: of what was measured, as plain data.
        figures: by name, as plain data, with all repeats.
        rows: names and figures as a person reads them.
        unit: of the two pictures below.
        series: for the picture: repeats in their order, by name.
        bars: for the picture: what was measured, by name.
        limits: for the picture: what could not be less, by name.
        notes: what a person should know, a line each.
    """

    what: str
    config: dict[str, Any]
    figures: dict[str, Any]
    rows: dict[str, str]
    unit: str
    bars: dict[str, float]
    series: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return everything but the table and the picture, and the machine."""
        content = {
            "what": self.what,
            "machine": describe_machine(),
            "config": self.config,
            "figures": self.figures,
            "notes": self.notes,
        }
        return json.dumps(content, indent=2) + "\n"


def describe_machine() -> dict[str, Any]:
    """Return what figures depend on beside the configuration."""
    system = {"platform": jax.default_backend(), "cores": os.cpu_count(), "system": platform.platform(terse=True)}
    return {**environment(jax.device_count()), **system}


def print_result(result: Result, console: Console) -> None:
    """Print the figures as a table, with the machine above and the notes below."""
    machine = describe_machine()
    title = (
        f"{result.what} on {machine['devices']} × {machine['device']}, {machine['cores']} cores, jax {machine['jax']}"
    )
    table = Table(title=title, title_justify="left", show_header=False, pad_edge=False)
    for name, figure in result.rows.items():
        table.add_row(name, figure)
    console.print(table)
    legend = ("Times are medians; in brackets the quartiles; the range.",) if result.series else ()
    for note in (*legend, *result.notes):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def draw_result(result: Result, path: Path) -> None:
    """Draw the repeats in their order, and beside them what was measured over what could not be less, into a PNG.

    Raises:
        InputError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    figure.suptitle(f"slm-jax bench {result.what}: {describe_machine()['device']}", fontsize=10)
    n_panels = 2 if result.series else 1
    if result.series:
        axes = figure.add_subplot(1, n_panels, 1)
        for name, values in result.series.items():
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, linewidth=0.8, label=name)
        axes.set_xlabel("repeat")
        axes.set_ylabel(result.unit)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    axes = figure.add_subplot(1, n_panels, n_panels)
    bars = {**result.bars, **result.limits}
    colors = [MEASURED] * len(result.bars) + [BOUND] * len(result.limits)
    drawn = axes.barh(list(bars), list(bars.values()), color=colors)
    axes.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(result.unit)
    try:
        path = path.resolve()  # a link stays
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(figure, path)
    except OSError as error:
        raise unwritable(path, error) from None


def bound_rows(bounds: dict[str, float], ceilings: Ceilings, prefix: str = "") -> dict[str, str]:
    """Return the rows of the lower bounds of a time, with the limits; each name begins with ``prefix``."""
    what = {"arithmetic": "least, FLOPs over peak", "memory": "least, bytes over bandwidth"}
    limits = {
        "arithmetic": format_flops(ceilings.flops or 0),
        "memory": f"{(ceilings.bandwidth or 0) / 1e9:,.4g} GB/s",
    }
    return {prefix + what[name]: f"{1e3 * bound:.4g} ms (at {limits[name]})" for name, bound in bounds.items()}


def format_flops(rate: float) -> str:
    """Write FLOP/s as a person would."""
    return f"{rate / 1e12:,.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.4g} GFLOP/s"
