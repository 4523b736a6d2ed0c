"""The result of a measurement: as JSON, as a table, as a picture."""

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from slm_jax.files import unwritable
from slm_jax.pictures import own_style, write_png
from slm_jax.tools.bench.instruments import Timing, format_flops
from slm_jax.training.hardware import environment
from slm_jax.training.progress import format_bytes

MEASURED, BOUND = "#c2410c", "#9ab8d9"


def _seconds(value: float) -> str:
    return str(Timing((value,)))


def _bounds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{_seconds(bound)} by {name}" for name, bound in seconds.items()) or "unknown"


# The figures that the table shows, each with its name and form; all others are in the JSON only.
SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "import_jax_flax_seconds": ("import jax, flax", str),
    "import_slm_jax_seconds": ("import slm_jax, beyond that", str),
    "first_use_slm_jax_seconds": ("slm_jax.GPTModel and slm_jax.load_gpt2, used for the first time", str),
    "first_step_empty_cache_seconds": ("train to the first step, empty cache", str),
    "first_step_warm_cache_seconds": ("train to the first step, warm cache", str),
    "compile_seconds": ("compilation", _seconds),
    "step_seconds": ("step, waited for", str),
    "queued_step_seconds": ("step, queued as in train", str),
    "ready_seconds": ("until batches can be read", _seconds),
    "batch_seconds": ("a batch", str),
    "placing_seconds": ("a batch to the device", str),
    "share_of_step": ("share of a step", "{:.2%}".format),
    "tokens_per_step": ("tokens a step", "{:,}".format),
    "tokens_per_batch": ("tokens a batch", "{:,}".format),
    "tokens_per_second": ("tokens a second", "{:,.0f}".format),
    "flops_per_second": ("arithmetic", format_flops),
    "mfu": ("MFU", "{:.1%}".format),
    "bounds_seconds": ("least time of a step", _bounds),
    "prefill_seconds": ("prompt", str),
    "prefill_tokens_per_second": ("tokens a second of the prompt", "{:,.0f}".format),
    "decode_step_seconds": ("each token after", str),
    "decode_tokens_per_second": ("tokens a second after", "{:,.1f}".format),
    "decode_bounds_seconds": ("least time of a token", _bounds),
    "bytes_per_step": ("read for a token", format_bytes),
    "bandwidth_share": ("share of the bandwidth", "{:.0%}".format),
    "planned_bytes": ("planned (slm-jax plan)", format_bytes),
    "xla_bytes": ("memory by XLA's analysis", format_bytes),
    "measured_bytes": ("measured", format_bytes),
    "least_bytes": ("parameters and optimizer alone", format_bytes),
    "peak_bytes": ("peak memory", format_bytes),
    "loss": ("loss", "{:.4f}".format),
    "ceilings": ("limits of a device", str),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a measurement."""

    what: str  # train, generate, data, startup or memory
    config: dict[str, Any]
    figures: dict[str, Any]  # plain data, timings and limits; "cases" is a list of further ones, each of a batch size
    notes: tuple[str, ...] = ()

    def shown(self) -> Iterator[tuple[str, Any, str]]:
        """Yield name, value and text of each figure that is shown."""
        for case in (*self.figures.get("cases", ()), self.figures):
            prefix = f"batch {case['batch_size']}: " if "batch_size" in case else ""
            for key, (name, form) in SHOWN.items():
                if key in case:
                    yield prefix + name, case[key], "unknown" if case[key] is None else form(case[key])

    def to_json(self) -> str:
        content = {**dataclasses.asdict(dataclasses.replace(self, figures={})), "figures": self.figures}
        return json.dumps({**content, "machine": describe_machine()}, indent=2, default=_plain) + "\n"


def _plain(value: Any) -> dict[str, Any]:
    return value.to_dict() if isinstance(value, Timing) else dataclasses.asdict(value)


def describe_machine() -> dict[str, Any]:
    system = {"platform": jax.default_backend(), "cores": os.cpu_count(), "system": platform.platform(terse=True)}
    return {**environment(jax.device_count()), **system}


def print_result(result: Result, console: Console) -> None:
    machine = describe_machine()
    where = f"{machine['devices']} × {machine['device']}, {machine['cores']} cores, jax {machine['jax']}"
    table = Table(title=f"{result.what} on {where}", title_justify="left", show_header=False, pad_edge=False)
    for name, _, text in result.shown():
        table.add_row(name, text)
    console.print(table)
    is_timed = any(isinstance(value, Timing) for _, value, _ in result.shown())
    legend = ["Times are medians; in brackets the quartiles; the range."] if is_timed else []
    for note in (*legend, *result.notes):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


@own_style()
def draw_result(result: Result, path: Path) -> None:
    """Draw all repeats of each time, and lower bounds beside them, or else bytes, into a PNG."""
    from matplotlib.figure import Figure

    shown = [(name, value) for name, value, _ in result.shown()]
    timings = [(name, value.seconds) for name, value in shown if isinstance(value, Timing)]
    bounds = [
        (f"{name}, {kind}", [bound])
        for name, value in shown
        if isinstance(value, dict)
        for kind, bound in value.items()
    ]
    sizes = [(name, [value]) for name, value in shown if isinstance(value, int | float)]
    scale, unit = (1e3, "ms") if timings else (1e-6, "MB")
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=f"slm-jax bench {result.what}: {describe_machine()['device']}", xlabel=unit)
    for points, color in ((timings or sizes, MEASURED), (bounds, BOUND)):
        for name, values in points:
            scaled = [scale * value for value in values]
            axes.plot(scaled, [name] * len(scaled), "o", color=color, alpha=0.6)
            axes.annotate(f" {np.median(scaled):.4g}", (max(scaled), name), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(x=0.15)
    try:
        path = path.resolve()  # a link stays
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(figure, path)
    except OSError as error:
        raise unwritable(path, error) from None
