"""A plan as tables and sentences."""

from rich.console import Console
from rich.table import Table

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
    lines = [
        "(1) Not at the same time: the larger one counts.",
        "(2) On a CPU: copies of moments, mostly after the backward pass; with mesh.fsdp: gathered parameters.",
        "The total is an estimate: within 10 % of XLA's own on CPU and TPU (benchmarks/BENCHMARKS.md); GPUs unchecked.",
        "",
        *_verdict(plan),
        "",
        *plan.notes,
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _model_table(plan: Plan) -> Table:
    devices = f"{plan.n_devices} × {plan.device}" if plan.n_devices > 1 else plan.device
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
    if plan.tokens_per_second and plan.peak_flops:
        share = f"{plan.mfu:.0%} of {plan.peak_flops / 1e12:,.4g} TFLOP/s"
        rows["speed"] = f"{plan.tokens_per_second:,.0f} tokens/s, if {share} are reached: an assumption (--mfu)"
    if plan.hours is not None:
        rows["time"] = format_duration(3600 * plan.hours)
    if plan.hours_for_20 is not None:
        wanted = _count(CHINCHILLA * plan.n_params)
        rows[f"for {CHINCHILLA} tokens a parameter"] = f"{format_duration(3600 * plan.hours_for_20)} ({wanted} tokens)"
    table = Table(title=f"on {devices}", title_justify="left", show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


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
