"""The speed of a recipe's training step, and the limits of the device."""

import dataclasses
import math
from typing import Any

from slm_jax.config import to_dict
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.bench.ceilings import Ceilings, Peak, find_ceilings
from slm_jax.tools.bench.compiled_step import CompiledStep, StepTimer, compile_step, with_known_vocabulary
from slm_jax.tools.bench.peak_memory import PeakMemory
from slm_jax.tools.bench.result import Result, bound_rows, format_flops
from slm_jax.tools.bench.timing import time_calls
from slm_jax.training.progress import format_bytes

FORMULA = "(6 N + 12 layers · width · context) · tokens/s / (devices · peak), N without position embeddings"


def measure(config: RunConfig, *, warmup: int, repeats: int, device: str | None = None, peak: Peak = None) -> Result:
    """Measure the training step of a run on random tokens: ``repeats`` waited for one by one, and as many queued."""
    config, notes = with_known_vocabulary(config)
    step = compile_step(config)
    with PeakMemory() as memory:
        timer = StepTimer(step)
        waiting = time_calls(timer.step_and_wait, warmup=warmup, repeats=repeats)
        queued = timer.queue(repeats)
    ceilings = find_ceilings(step.cfg.dtype, device, peak)  # may take more memory, so after its peak
    n_bytes, planned, loss = memory.n_bytes, step.planned_bytes, timer.loss
    figures = {
        "compile_seconds": step.compile_seconds,
        "step_seconds": waiting.to_dict(),
        "queued_step_seconds": queued.to_dict(),
        **speed_figures(step, queued.median, ceilings),
        "peak_bytes": n_bytes,
        "peak_bytes_of": memory.of,
        "xla_bytes": planned or None,
        "loss": loss if math.isfinite(loss) else None,
        "loss_finite": math.isfinite(loss),
    }
    mfu = figures["mfu"]
    unknown = "unknown for a part of a model" if figures["flops_per_second"] is None else None
    rows = {
        "compilation": f"{step.compile_seconds:.2f} s",
        "step, waited for": str(waiting),
        "step, queued as in train": str(queued),
        "tokens": f"{figures['tokens_per_second']:,.0f} a second ({figures['tokens_per_step']:,} a step)",
        "arithmetic": unknown or format_flops(figures["flops_per_second"]),
        "MFU": unknown or ("unknown peak: pass --peak measured, or --peak FLOP/s" if mfu is None else f"{mfu:.1%}"),
        **bound_rows(figures["bounds_seconds"], ceilings),
        "peak memory": f"{format_bytes(n_bytes)} of {memory.of}" if n_bytes else "unknown on this system",
        "memory by XLA's analysis": f"{format_bytes(planned)} a device" if planned else "unknown",
        "loss": f"{loss:.4f}" if math.isfinite(loss) else "not finite: lower --optimizer.learning_rate",
    }
    return Result(
        what="train",
        config=to_dict(config),
        figures=figures,
        rows=rows,
        unit="ms",
        series={"waited for": waiting.milliseconds, "queued as in train": queued.milliseconds},
        bars={"step, waited for": 1e3 * waiting.median, "step, queued": 1e3 * queued.median},
        limits={f"least by {name}": 1e3 * bound for name, bound in figures["bounds_seconds"].items()},
        notes=(*(notes or step.notes), f"MFU: {FORMULA}; limits: {ceilings.source}"),
    )


def speed_figures(step: CompiledStep, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """Return the speed of a step of so many seconds: tokens a second, FLOP/s, MFU, and lower bounds."""
    flops = None if step.flops_per_token is None else step.flops_per_token * step.tokens
    achieved = None if flops is None else flops / seconds
    n_devices = step.mesh.size
    return {
        "tokens_per_step": step.tokens,
        "tokens_per_second": step.tokens / seconds,
        "flops_per_token": step.flops_per_token,
        "flops_per_second": achieved,
        "devices": n_devices,
        "ceilings": dataclasses.asdict(ceilings),
        "mfu": achieved / (n_devices * ceilings.flops) if achieved and ceilings.flops else None,
        "mfu_formula": FORMULA,
        "bounds_seconds": ceilings.bounds(flops and flops / n_devices, step.moved_bytes),
    }
