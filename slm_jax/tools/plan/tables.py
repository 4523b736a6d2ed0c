"""A plan as tables and sentences."""

import math
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from slm_jax.tools.plan.communication import StepTime
from slm_jax.tools.plan.compilers import Compiled
from slm_jax.tools.plan.estimate import CHINCHILLA, Plan
from slm_jax.training.progress import format_bytes, format_duration

_PARTS = {
    "parameters": "parameters",
    "optimizer": "optimizer state ({moments})",
    "gradients": "gradients",
    "batch": "batch",
    "activations": "kept for the backward pass",
    "logits": "logits and loss, before it (1)",
    "block": "one block's backward pass (1)",
    "workspace": "workspace of the compiler (2)",
}
_MOMENTS = {"adamw": "Adam's two moments", "muon": "Muon's one moment, Adam's two elsewhere"}


def print_plan(plan: Plan, console: Console) -> None:
    console.print(_model_table(plan))
    console.print(_memory_table(plan))
    if plan.n_devices > 1:
        console.print(_shares_table(plan))
    if plan.step is not None and plan.n_devices > 1:
        console.print(_step_table(plan, plan.step))
    lines = [
        "(1) Not at the same time: the larger one counts.",
        "(2) On a CPU: copies of moments, mostly after the backward pass; with mesh.fsdp: gathered parameters.",
        "The total is an estimate: within 10 % of XLA's own on CPU, TPU and H100 (benchmarks/BENCHMARKS.md).",
        "",
        *_verdict(plan),
        "",
        *plan.notes,
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _model_table(plan: Plan) -> Table:
    trained = f", trained {plan.n_trained:,}" if plan.n_trained != plan.n_params else ""
    rows = {
        "parameters": f"{plan.n_params:,}{trained}",
        "computed in": f"{plan.dtype}, attention {plan.attention}",
        "rows of tokens": f"{plan.seq:,} tokens each, of {plan.vocab_size:,} ids; {plan.rows:,} at a time on a device",
    }
    if plan.flops_per_token:
        rows["FLOPs a token"] = f"{_count(plan.flops_per_token)} (6 · parameters + 12 · layers · width · context)"
    if plan.tokens:
        rows["tokens"] = f"{plan.tokens:,.0f}: {plan.tokens / plan.n_params:.3g} a parameter"
    if plan.tokens_per_second and plan.peak_flops and plan.mfu and plan.step:
        reached = plan.step.mfu[0]
        why = ", an assumption (--mfu)"
        if not math.isclose(reached, plan.mfu):
            why = f": communication takes longer than computation at the assumed {plan.mfu:.0%} (--mfu)"
        speed = f"{plan.tokens_per_second:,.0f} tokens/s, at {reached:.0%} of {plan.peak_flops / 1e12:,.4g} TFLOP/s"
        rows["speed"] = f"{speed}{why}"
    if plan.hours is not None:
        rows["time"] = format_duration(3600 * plan.hours)
    if plan.hours_for_20 is not None:
        wanted = _count(CHINCHILLA * plan.n_params)
        rows[f"for {CHINCHILLA} tokens a parameter"] = f"{format_duration(3600 * plan.hours_for_20)} ({wanted} tokens)"
    table = Table(title=f"on {_devices(plan)}", title_justify="left", show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _devices(plan: Plan) -> str:
    if plan.n_devices == 1:
        return plan.device
    hosts = f" on {plan.n_hosts} hosts" if plan.n_hosts > 1 else ""
    slices = f" of {plan.n_slices} slices" if plan.n_slices > 1 else ""
    axes = " × ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1)
    return f"{plan.n_devices} × {plan.device}{hosts}{slices}, mesh {axes}"


def _shares_table(plan: Plan) -> Table:
    """Show by which rules the parameters are split (:mod:`slm_jax.nn.sharding`)."""
    table = Table(title="parameters on each device", title_justify="left", pad_edge=False)
    for column in ("", "shape", "axis: split along", "bytes"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for share in plan.shares:
        split = ", ".join(f"{name}: {along}" for name, along in share.split.items())
        table.add_row(share.path, " × ".join(map(str, share.shape)), split or "whole", format_bytes(share.n_bytes))
    return table


def _step_table(plan: Plan, step: StepTime) -> Table:
    """Show what each device sends in a training step, and the least time of that and of the computation."""
    table = Table(title="one training step, on each device, at best", title_justify="left", pad_edge=False)
    for column in ("", "collective", "along", "sends", "time"):
        table.add_column(column, justify="right" if column in ("sends", "time") else "left")
    for one in step.exchanges:
        along = " × ".join(axis for axis in one.axes if plan.mesh.get(axis, 1) > 1)
        network = ", over the network" if one.spans > 1 else ""
        table.add_row(one.what, one.kind, f"{along}{network}", format_bytes(one.sent), _milliseconds(max(one.wires)))
    table.add_section()
    table.add_row("communication", "", "", format_bytes(step.sent), _milliseconds(step.wires))
    table.add_row("computation at the peak", "", "", "", _milliseconds(step.compute))
    overlapped, in_turn = step.mfu
    table.add_row("MFU, communication overlapped or not", "", "", "", f"{overlapped:.0%} or {in_turn:.0%}")
    below = "always" if step.bound_below is None else f"below {step.bound_below:,.0f} tokens"
    table.add_row("communication-bound", "", "", "", below)
    return table


def print_compiled(programs: Sequence[Compiled], plan: Plan, console: Console) -> None:
    """Print what a compiler makes of a run's programs."""
    table = Table(title=f"compiled for {_devices(plan)}", title_justify="left", pad_edge=False)
    table.add_column("on each device")
    for program in programs:
        table.add_column(program.name, justify="right")
    for label, cell in _COMPILED.items():
        table.add_row(label, *("-" if one.problem else cell(one) for one in programs))
    kinds = dict.fromkeys(one.kind for program in programs for one in program.collectives)
    for kind in kinds:
        table.add_row(kind, *(_of_kind(program, kind) for program in programs))
    for kernel in dict.fromkeys(name for program in programs for name in program.kernels):
        table.add_row(kernel, *(f"{n:,} ×" if (n := program.kernels.get(kernel)) else "-" for program in programs))
    console.print(table)
    for program in programs:
        if program.problem:
            line = f"{program.name}: does not compile: {program.problem}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


_COMPILED: dict[str, Callable[[Compiled], str]] = {
    "memory": lambda one: format_bytes(one.n_bytes or 0),
    "sends": lambda one: format_bytes(one.sent),
    "communication, at best": lambda one: _milliseconds(one.wire_seconds),
}


def _of_kind(program: Compiled, kind: str) -> str:
    found = [one for one in program.collectives if one.kind == kind]
    if not found:
        return "-"
    return f"{sum(one.count for one in found):,.0f} ×, {format_bytes(sum(one.sent for one in found))}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.3g} ms"


def _memory_table(plan: Plan) -> Table:
    limit = "" if plan.memory_limit is None else f", of {format_bytes(plan.memory_limit)}"
    table = Table(title=f"memory of one device{limit}, by model.remat", title_justify="left", pad_edge=False)
    table.add_column("")
    for remat in plan.by_remat:
        table.add_column(f"{remat} (configured)" if remat == plan.remat else remat, justify="right")
    fits = plan.by_remat.values()
    for part, label in _PARTS.items():
        sizes = [getattr(fit.memory, part) for fit in fits]
        shown = ("-" if size == 0 else "< 0.1 MB" if size < 5e4 else format_bytes(size) for size in sizes)
        table.add_row(label.format(moments=_MOMENTS[plan.optimizer]), *shown)
    table.add_section()
    table.add_row("total", *(format_bytes(fit.memory.total) for fit in fits))
    if plan.xla_bytes is not None:
        compiled = format_bytes(plan.xla_bytes)
        table.add_row("total by XLA", *(compiled if remat == plan.remat else "" for remat in plan.by_remat))
    table.add_row("an evaluation", *([format_bytes(plan.evaluation_bytes)] * len(fits)))
    if plan.memory_limit is not None:
        table.add_row("fits", *("yes" if fit.fits else "no" for fit in fits))
        table.add_row("rows at a time, at most", *(f"{fit.largest_rows:,}" for fit in fits))
        table.add_row("train.accumulate, at least", *(str(fit.accumulate or "none") for fit in fits))
    return table


def _verdict(plan: Plan) -> list[str]:
    if plan.memory_limit is None:
        return ["Whether it fits is unknown: the size of the memory is unknown."]
    if plan.fits:
        return ["It fits."]
    if plan.changes:
        return ["It does not fit. It does with any of these:", *(f"  {change}" for change in plan.changes)]
    return [
        "It does not fit, even one row at a time with --model.remat full; choose a smaller model or context, more "
        "devices with --mesh.fsdp, or a device with more memory."
    ]


def _count(number: float) -> str:
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"
