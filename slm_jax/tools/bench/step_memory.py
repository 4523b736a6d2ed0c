"""The memory of a recipe's training step: as planned, by XLA's analysis, as measured."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import jax

from slm_jax.config import to_dict
from slm_jax.errors import InputError
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.bench.compiled_step import CompiledStep, StepTimer, compile_step, with_known_vocabulary
from slm_jax.tools.bench.peak_memory import PeakMemory
from slm_jax.tools.bench.result import Result
from slm_jax.tools.plan import Plan, make_plan
from slm_jax.training.compile_cache import set_up
from slm_jax.training.hardware import device_here
from slm_jax.training.program import out_of_memory_as_input_error
from slm_jax.training.progress import format_bytes

_STEPS = 3


def measure(config: RunConfig) -> Result:
    """Compare the planned memory of a training step with XLA's analysis and with the peak of three steps.

    On a CPU the steps run in a fresh process, which has not compiled anything.
    """
    config, notes = with_known_vocabulary(config)
    plan = plan_here(config)
    planned = None if plan is None else plan.by_remat[plan.remat].memory
    total = None if planned is None else planned.total
    least = None if planned is None else planned.parameters + planned.optimizer
    step = compile_step(config)
    peak = peak_of_a_process(config) if jax.default_backend() == "cpu" else measured_peak(step)
    bars = {"planned": total, "XLA": step.planned_bytes, "measured": peak.n_bytes}
    return Result(
        what="memory",
        config=to_dict(config),
        figures={
            "planned_bytes": total,
            "planned_parts": None if planned is None else dataclasses.asdict(planned),
            "xla_bytes": step.planned_bytes or None,
            "measured_bytes": peak.n_bytes,
            "measured_of": peak.of,
            "devices": step.mesh.size,
            "limit_bytes": None if plan is None else plan.memory_limit,
            "least_bytes": least,
        },
        rows={
            "planned (slm-jax plan)": _a_device(total),
            "XLA's analysis of the compiled step": _a_device(step.planned_bytes),
            "measured": f"{format_bytes(peak.n_bytes)} of {peak.of}" if peak.n_bytes else "unknown on this system",
            "parameters and optimizer alone": _a_device(least),
        },
        unit="MB",
        bars={name: n_bytes / 1e6 for name, n_bytes in bars.items() if n_bytes},
        limits={"parameters and optimizer": least / 1e6} if least else {},
        notes=notes or step.notes,
    )


def plan_here(config: RunConfig) -> Plan | None:
    """Plan the run for the devices here; None: accelerators without a known data sheet."""
    known = device_here()
    if known is None and jax.default_backend() != "cpu":
        return None
    return make_plan(config, "cpu" if known is None else known.name, jax.device_count())


def measured_peak(step: CompiledStep) -> PeakMemory:
    """Run some steps, from making the state on, and return the peak of their memory."""
    with PeakMemory() as memory:
        timer = StepTimer(step)
        for _ in range(_STEPS):
            timer.step_and_wait()
    return memory


def peak_of_a_process(config: RunConfig) -> PeakMemory:
    """Measure in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_compile_and_measure, config).result()
        except BrokenProcessPool:
            raise InputError("the process to measure in was killed; out of memory?") from None


def _compile_and_measure(config: RunConfig) -> PeakMemory:
    set_up()  # with the compile cache that has the step already
    with out_of_memory_as_input_error():
        return measured_peak(compile_step(config))


def _a_device(n_bytes: float | None) -> str:
    return f"{format_bytes(n_bytes)} a device" if n_bytes else "unknown"
