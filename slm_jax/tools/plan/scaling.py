"""The tables of docs/scaling.md: large runs on many devices, by the formulas of ``slm-jax plan``."""

import math
from collections.abc import Callable
from typing import NamedTuple

from slm_jax.tasks.config import RunConfig, parse_args
from slm_jax.tools.plan.cluster import find_cluster
from slm_jax.tools.plan.communication import StepTime
from slm_jax.tools.plan.estimate import Plan, make_plan
from slm_jax.training.progress import format_bytes

CLUSTERS = ("h100x8", "h100x64", "h100x1024", "v5e-64", "v5p-256")
_GPT2 = {"tokenizer.kind": "gpt2", "train.eval_batch_size": 1024, "model.remat": "full"}
SHAPES: dict[str, dict[str, object]] = {
    "gpt2-xl": {**_GPT2, "model.preset": "gpt2-xl", "model.emb_dim": 1600, "train.batch_size": 1024},
    "7b": {
        **_GPT2,
        "model.preset": "gpt2-xl",
        "model.n_layers": 32,
        "model.n_heads": 32,
        "model.emb_dim": 4096,
        "model.context_length": 2048,
        "model.vocab_size": 32_000,
        "model.tie_weights": "false",
        "tokenizer.kind": "bpe",
        "tokenizer.vocab_size": 32_000,
        "train.batch_size": 2048,
    },
}


class Row(NamedTuple):
    """A run on a cluster."""

    cluster: str
    fsdp: int
    accumulate: int  # the least with which it fits
    plan: Plan
    step: StepTime


def scaling_rows(shape: str) -> list[Row]:
    """Plan a shape on every cluster: parameters are split over a host of GPUs, or over a TPU slice.

    That is, over as many of these devices as divide the width: others would have whole copies of most matrices.
    """
    return [_row(shape, cluster) for cluster in CLUSTERS]


def run_config(shape: str, fsdp: int, accumulate: int = 1) -> RunConfig:
    """Return the configuration of a run of :data:`SHAPES`."""
    keys = {**SHAPES[shape], "mesh.fsdp": fsdp, "train.accumulate": accumulate}
    return parse_args([f"--{key}={value}" for key, value in keys.items()])


def _row(shape: str, cluster: str) -> Row:
    fsdp = math.gcd(find_cluster(cluster).domain, int(str(SHAPES[shape]["model.emb_dim"])))
    plan = make_plan(run_config(shape, fsdp), cluster)
    accumulate = plan.by_remat[plan.remat].accumulate
    assert accumulate is not None, f"{shape} does not fit {cluster}"
    plan = make_plan(run_config(shape, fsdp, accumulate), cluster)
    assert plan.step is not None
    return Row(cluster, fsdp, accumulate, plan, plan.step)


def scaling_table(shape: str) -> str:
    """Return the rows of a shape as a table in Markdown."""
    rows = scaling_rows(shape)
    lines = [["", *(f"`{row.cluster}`" for row in rows)], ["---", *("---:" for _ in rows)]]
    lines += [[label, *(cell(row) for row in rows)] for label, cell in _CELLS.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sent(row: Row, over_network: bool) -> str:
    sent = sum(one.sent for one in row.step.exchanges if (one.spans > 1) == over_network)
    return format_bytes(sent) if sent else "-"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _bound(row: Row) -> str:
    below = row.step.bound_below
    return "always" if below is None else f"{below / row.accumulate:,.0f} tokens"


_CELLS: dict[str, Callable[[Row], str]] = {
    "devices": lambda row: f"{row.plan.n_devices:,}",
    "mesh: data × fsdp": lambda row: f"{row.plan.n_devices // row.fsdp} × {row.fsdp}",
    "rows at a time on a device": lambda row: f"{row.plan.rows:,}",
    "micro-batches (`train.accumulate`)": lambda row: f"{row.accumulate:,}",
    "memory of a device": lambda row: format_bytes(row.plan.by_remat[row.plan.remat].memory.total),
    "computation at the peak": lambda row: _time(row.step.compute),
    "each device sends: links": lambda row: _sent(row, over_network=False),
    "each device sends: network": lambda row: _sent(row, over_network=True),
    "communication": lambda row: _time(row.step.wires),
    "expected MFU, communication overlapped": lambda row: f"{row.step.mfu[0]:.0%}",
    "expected MFU, communication not overlapped": lambda row: f"{row.step.mfu[1]:.0%}",
    "tokens at a time on a device": lambda row: f"{row.plan.rows * row.plan.seq:,}",
    "communication-bound below": _bound,
    "tokens per second": lambda row: f"{row.plan.tokens_per_second:,.0f}",
}
