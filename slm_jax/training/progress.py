"""The progress of a run: a live line in a terminal, plain lines elsewhere."""

import math
import time
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn
from rich.table import Column, Table

from slm_jax.errors import printable

PLAIN_INTERVAL = 5.0  # seconds between two plain lines of training
WIDE = 120  # columns at which a progress bar fits beside the metrics


class ProgressLine:
    """Step, losses, learning rate, tokens/s, MFU and time left; silent on hosts other than the first."""

    def __init__(self, console: Console, total_steps: int, first_step: int = 0):
        self.console = console
        self._total = total_steps
        self._validation_loss: float | None = None
        self._last_plain = -math.inf
        self._live: Progress | None = None
        if console.is_terminal and not console.quiet:
            wide = console.width >= WIDE
            bar: tuple[ProgressColumn, ...] = (BarColumn(bar_width=16), TaskProgressColumn()) if wide else ()
            self._live = Progress(*bar, TextColumn("{task.description}"), console=console, refresh_per_second=4)
            self._task = self._live.add_task("compiling", total=total_steps, completed=first_step)

    def __enter__(self) -> "ProgressLine":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def train(self, row: dict[str, Any], seconds_per_step: float) -> None:
        """Show a line of training metrics."""
        text = self._line(row, seconds_per_step)
        if self._live:
            self._live.update(self._task, completed=row["step"], description=text)
        elif time.monotonic() - self._last_plain >= PLAIN_INTERVAL:
            self._last_plain = time.monotonic()
            self.note(f"step {text}")

    def validation(self, row: dict[str, Any], score: str | None = None) -> None:
        """Show an evaluation; ``score`` is a key of the row with a number between 0 and 1."""
        self._validation_loss = row["loss"]
        text = f"step {row['step']:,}: validation loss {row['loss']:.4f}"
        text += f", perplexity {row['perplexity']:,.2f}" if "perplexity" in row else ""
        text += f", {score} {row[score]:.2%}" if score in row else ""
        self.note(text)

    def note(self, text: str) -> None:
        """Print a line of its own."""
        shown = printable(text) if self.console.is_terminal else text
        self.console.print(shown, markup=False, highlight=False, soft_wrap=True)

    def _line(self, row: dict[str, Any], seconds_per_step: float) -> str:
        left = format_duration(seconds_per_step * (self._total - row["step"]))
        parts = [f"{row['step']:,}/{self._total:,}", f"{left} left", f"loss {row['loss']:.3f}"]
        if self._validation_loss is not None:
            parts.append(f"val {self._validation_loss:.3f}")
        parts += [f"lr {row['learning_rate']:.1e}", f"{row['tokens_per_second']:,.0f} tok/s"]
        if row.get("mfu") is not None:
            parts.append(f"MFU {row['mfu']:.0%}")
        return " · ".join(parts)


def format_duration(seconds: float) -> str:
    """Format seconds: less than 1 s, 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole == 0 < seconds:
        return "less than 1 s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(n_bytes: float) -> str:
    """Format a size in MB or GB (powers of ten)."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def parameter_table(params: Any) -> Table:
    """Return a table with the shape and count of each leaf of nested dicts of arrays or shapes."""
    from flax.traverse_util import flatten_dict  # here, because preparing data needs no Flax

    table = Table("name", "shape", Column("count", justify="right"), title="parameters", title_justify="left")
    table.pad_edge = False
    for name, leaf in flatten_dict(params, sep="/").items():
        table.add_row(name, " × ".join(map(str, leaf.shape)), f"{math.prod(leaf.shape):,}")
    table.add_section()
    table.add_row("all", "", f"{count_leaves(params):,}")
    return table


def count_leaves(params: Any) -> int:
    """Return the number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
