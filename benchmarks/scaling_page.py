"""SCALING.md and its picture, from what scaling.py has measured and computed."""

import math
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from slm_jax.pictures import write_png
from slm_jax.training.progress import format_bytes, format_duration

MEASURED, COMPUTED, BOUND = "#c2410c", "#9ab8d9", "#777777"
LADDERS = {"parameters": "parameters", "context": "context (tokens)", "batch": "batch (rows)"}

_PAGE = """# Scaling

Time and memory of a training step as the model, its context and the batch grow, and of the data reader as the text
grows. Written by `python benchmarks/scaling.py`, {date}, in {minutes} min; the raw figures are in
[results/scaling.json](results/scaling.json).

Machine: {devices} × {device}, {cores} cores, Python {python}, jax {jax}; {dtype}. Peak performance ({source}): {peak}
GFLOP/s in large matrix products, {bandwidth} GB/s. Load average at the start: {load}{busy}.

**Measured**: the median and range of 3 to 7 steps (AdamW, in a separate process), and the peak memory of that process
beyond what it held before. *Computed*, in italics, where a step does not fit into this machine or the time limit:
memory from `slm-jax plan`, time extrapolated from the FLOPs at the share of the peak that the last measured row
reached. There are two lower bounds:

- arithmetic: (6 N + 12 · layers · width · context) FLOPs per token, N without position embeddings, divided by the peak;
  as usual, attention counts in full, although half of it is masked;
- memory traffic: parameters and Adam's two moments, read once and written once (24 bytes per parameter), divided by the
  bandwidth.

![time and memory](scaling.png)

## More parameters

{parameters_rows} tokens per step. GPT-2's shapes have its 50,257 token ids, the others 4,096.

{parameters_table}

Arithmetic, and so time, grows in proportion to the parameters once the matrices are large; small ones do not keep the
cores busy and reach a smaller share of the peak. From each measured row to the next, time grows as the number of
parameters to the power of {parameters_time} (1 is proportional).

Memory is also proportional: 16 bytes per parameter (parameter, gradient, two moments), copies made by the compiler, and
the activations, which grow only with width × layers.

```sh
{parameters_command}
```

## Longer context

The shape `tiny`, {context_tokens} tokens per step for every context, so that everything except attention stays the
same.

{context_table}

For the same number of tokens, attention's arithmetic grows in proportion to the context (quadratically per row);
everything else is constant. From each measured row to the next, time grows as the context to the power of
{context_time}, memory to the power of {context_bytes}. Both tend to 1 where attention dominates.

On a CPU, attention stores its weights for the backward pass: layers × heads × context numbers per token. Flash
attention on accelerators stores none: there memory stays constant and only time grows.

```sh
{context_command}
```

## Larger batches

The shape `mini`, context {batch_context}.

{batch_table}

Time and activations grow in proportion to the tokens; parameters and optimizer state do not grow. Larger batches help
only while the time per token falls; beyond that they only cost memory, and `--train.accumulate` gives the same gradient
without it. From each row to the next, time grows as the batch to the power of {batch_time}.

```sh
{batch_command}
```

## More data

Batches of 8 × 1,024 tokens at random offsets of a file of uint16 ids, read by one thread. Opening checks every id once.
Only the first 32 MB of a file are stored; the rest is a sparse hole, which is not read from disk, so the disk's time
comes on top. Own memory is the additional memory of the process, without the file's pages in the page cache, which the
system reclaims when needed.

{readers_table}

The time to open a file is proportional to its size; the time per batch and the memory are constant.

## Accelerators

All *computed*: 8 × 1,024 tokens per step in bfloat16 on one device, with the limits from the data sheet. The expected
throughput assumes {assumed} of the peak; `rows` is the largest number of rows that fit.

{accelerators_table}

For any other shape, device or number of devices:

```sh
{accelerators_command}
```

## On other machines

Divide the FLOPs of a step by your device's performance in large matrix products (measured by
`slm-jax bench train --peak measured`): no step is faster. A GPT-2-size model on an accelerator reaches a third to a
half of that, and less with smaller matrices. For the same dtype, memory is the same everywhere except for attention's
weights and the compiler's copies; check with `slm-jax plan --device NAME` before you rent one. """


def page(content: dict[str, Any]) -> str:
    """Return the page."""
    machine, ceilings, load = content["machine"], content["ceilings"], content["load_at_start"]
    ladders = {name: [row for row in content["steps"] if row["ladder"] == name] for name in LADDERS}
    values: dict[str, Any] = {key: machine[key] for key in ("devices", "device", "cores", "jax", "python")}
    for name, rows in ladders.items():
        values[f"{name}_table"] = _steps_table(rows)
        values[f"{name}_time"] = _powers(rows, name, "seconds")
        values[f"{name}_bytes"] = _powers(rows, name, "bytes")
        values[f"{name}_command"] = f"slm-jax plan {shlex.join(rows[-1]['flags'])}" if rows else ""
        values[f"{name}_context"] = f"{rows[0]['context']:,}" if rows else "-"
        values[f"{name}_rows"] = f"{rows[0]['batch']} × {rows[0]['context']:,}" if rows else "-"
        values[f"{name}_tokens"] = f"{rows[0]['tokens']:,}" if rows else "-"
    command = content["accelerators"][0]
    return _PAGE.format(
        **values,
        date=content["date"],
        minutes=math.ceil(content["seconds"] / 60),
        dtype=content["dtype"],
        source=ceilings["source"],
        peak=_number(ceilings["flops"] / 1e9),
        bandwidth=_number(ceilings["bandwidth"] / 1e9),
        load=f"{load:.1f}",
        busy=", **too high: other programs slowed this down**" if load > 1 else "",
        readers_table=_readers_table(content["readers"]),
        accelerators_table=_accelerators_table(content["accelerators"]),
        accelerators_command=f"slm-jax plan {shlex.join(command['flags'])} --device {command['device']}",
        assumed=f"{content['assumed_mfu']:.0%}",
    )


def _steps_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        bounds, seconds = row["bounds_seconds"], row["seconds"]
        share = bounds["arithmetic"] / (seconds or row["estimated_seconds"])
        lines.append(
            [
                row["name"],
                f"{row['parameters'] / 1e6:,.1f} M",
                f"{row['batch']} × {row['context']:,}",
                _with_range(seconds, row["repeats"]) if seconds else f"*{_time(row['estimated_seconds'])}*",
                _time(bounds["arithmetic"]),
                _time(bounds["memory"]),
                f"{share:.0%}" if seconds else f"*{share:.0%}*",
                format_bytes(row["bytes"]) if row["bytes"] else "",
                f"*{format_bytes(row['planned_bytes'])}*",
            ]
        )
    head = ["shape", "parameters", "batch", "step (range)", "arithmetic", "traffic", "of the peak", "memory", "planned"]
    return _table(head, lines)


def _readers_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "missing" in row:
            lines.append([f"{row['gigabytes']:g} GB", row["missing"], "", "", "", ""])
            continue
        batch = row["batch_seconds"]
        lines.append(
            [
                f"{row['gigabytes']:g} GB",
                f"{row['tokens']:,}",
                _time(row["open_seconds"]),
                _with_range(batch["median"], batch["repeats"]),
                f"{row['tokens_per_second'] / 1e6:,.0f} M",
                "not known" if row["own_bytes"] is None else format_bytes(row["own_bytes"]),
            ]
        )
    return _table(["file", "tokens", "opening", "batch (range)", "tokens per second", "own memory"], lines)


def _accelerators_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        bounds = row["bounds_seconds"]
        fits = row["bytes"] <= row["limit_bytes"]
        lines.append(
            [
                f"GPT-2 {row['size']}",
                row["device"],
                row["remat"],
                f"{format_bytes(row['bytes'])}{'' if fits else ', too much'}",
                f"{row['largest_rows']:,}",
                _time(bounds["arithmetic"]),
                _time(bounds["memory"]),
                f"{row['tokens_per_second']:,.0f}",
            ]
        )
    head = ["shape", "device", "remat", "memory", "rows", "arithmetic", "traffic", "tokens per second, expected"]
    return _table(head, lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _powers(rows: Sequence[dict[str, Any]], along: str, what: str) -> str:
    """Return the powers of ``along`` with which a measured figure grows from each row to the next."""
    known = [row for row in rows if row[what]]
    powers = [
        math.log(after[what] / before[what]) / math.log(after[along] / before[along])
        for before, after in pairwise(known)
    ]
    return ", ".join(f"{power:.2f}" for power in powers) or "(too few rows were measured)"


def _with_range(median: float, repeats: Sequence[float]) -> str:
    return f"{_time(median)} ({_time(min(repeats))} to {_time(max(repeats))})"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{_number(1e3 * seconds)} ms"
    return f"{seconds:.2f} s" if seconds < 60 else format_duration(seconds)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw time, above, and memory, below, over what grows, with the bounds, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=90, layout="constrained")
    ladders = list(dict.fromkeys(row["ladder"] for row in content["steps"]))
    panels = figure.subplots(2, len(ladders), sharex="col", squeeze=False)
    for column, ladder in enumerate(ladders):
        rows = [row for row in content["steps"] if row["ladder"] == ladder]
        time, memory = panels[0][column], panels[1][column]
        along = [row[ladder] for row in rows]
        for name, style in (("arithmetic", "--"), ("memory", ":")):
            bounds = [row["bounds_seconds"][name] for row in rows]
            time.plot(along, bounds, style, color=BOUND, linewidth=1, label=f"bound: {name}")
        _points(time, rows, ladder, "seconds", "estimated_seconds")
        memory.plot(
            along, [row["planned_bytes"] / 1e9 for row in rows], "--", color=BOUND, linewidth=1, label="planned"
        )
        gigabytes = [
            {**row, "gb": row["bytes"] and row["bytes"] / 1e9, "plan": row["planned_bytes"] / 1e9} for row in rows
        ]
        _points(memory, gigabytes, ladder, "gb", "plan")
        memory.set_xlabel(LADDERS[ladder])
        for axes in (time, memory):
            axes.set_xscale("log", base=10 if ladder == "parameters" else 2)
            axes.set_yscale("log")
            axes.grid(alpha=0.25)
        if ladder != "parameters":
            memory.xaxis.set_major_formatter("{x:,.0f}")
    panels[0][0].set_ylabel("seconds per step")
    panels[1][0].set_ylabel("GB")
    for axes in (panels[0][0], panels[1][0]):
        axes.legend(frameon=False, fontsize=8)
    write_png(figure, path)


def _points(axes: Any, rows: Sequence[dict[str, Any]], along: str, measured: str, computed: str) -> None:
    for kind, key, fill in (("measured", measured, MEASURED), ("computed", computed, "none")):
        chosen = [row for row in rows if bool(row[measured]) == (kind == "measured")]
        color = MEASURED if kind == "measured" else COMPUTED
        values = [row[key] for row in chosen]
        axes.plot(
            [row[along] for row in chosen], values, "o", color=color, markerfacecolor=fill, markersize=5, label=kind
        )
