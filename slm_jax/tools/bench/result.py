"""The result of a measurement: as JSON, as a table, as a picture."""

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
    """The result of a measurement.

    Attributes:
        what: kind of measurement: train, generate, data, startup or memory.
        config, figures: plain data for JSON.
        rows: names and figures for the table.
        unit, bars, series, limits: for the picture: measured values, repeats in their order, lower bounds.
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
        content = {name: getattr(self, name) for name in ("what", "config", "figures", "notes")}
        return json.dumps({**content, "machine": describe_machine()}, indent=2) + "\n"


def describe_machine() -> dict[str, Any]:
    """Return what figures depend on beside the configuration."""
    system = {"platform": jax.default_backend(), "cores": os.cpu_count(), "system": platform.platform(terse=True)}
    return {**environment(jax.device_count()), **system}


def print_result(result: Result, console: Console) -> None:
    """Print the figures as a table, with the machine above and the notes below."""
    machine = describe_machine()
    where = f"{machine['devices']} × {machine['device']}, {machine['cores']} cores, jax {machine['jax']}"
    table = Table(title=f"{result.what} on {where}", title_justify="left", show_header=False, pad_edge=False)
    for name, figure in result.rows.items():
        table.add_row(name, figure)
    console.print(table)
    legend = ("Times are medians; in brackets the quartiles; the range.",) if result.series else ()
    for note in (*legend, *result.notes):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def draw_result(result: Result, path: Path) -> None:
    """Draw the repeats in their order, and beside them the measured values over their lower bounds, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    figure.suptitle(f"slm-jax bench {result.what}: {describe_machine()['device']}", fontsize=10)
    *left, axes = figure.subplots(1, 2 if result.series else 1, squeeze=False)[0]
    for repeats in left:
        for name, values in result.series.items():
            repeats.plot(range(1, len(values) + 1), values, marker="o", markersize=3, linewidth=0.8, label=name)
        repeats.set(xlabel="repeat", ylabel=result.unit)
        repeats.set_ylim(bottom=0)
        repeats.legend(frameon=False, fontsize=8)
    bars = {**result.bars, **result.limits}
    colors = [MEASURED] * len(result.bars) + [BOUND] * len(result.limits)
    axes.bar_label(axes.barh(list(bars), list(bars.values()), color=colors), fmt="%.4g", padding=3, fontsize=8)
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
    """Return the table's rows of the lower bounds of a time; each name begins with ``prefix``."""
    kinds = {
        "arithmetic": ("least, FLOPs over peak", format_flops(ceilings.flops or 0)),
        "memory": ("least, bytes over bandwidth", f"{(ceilings.bandwidth or 0) / 1e9:,.4g} GB/s"),
    }
    return {prefix + kinds[name][0]: f"{1e3 * bound:.4g} ms (at {kinds[name][1]})" for name, bound in bounds.items()}


def format_flops(rate: float) -> str:
    """Format FLOP/s with a suitable prefix."""
    return f"{rate / 1e12:,.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.4g} GFLOP/s"
