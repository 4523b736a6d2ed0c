"""What memory the training step of a recipe takes: as planned, as XLA says, as measured."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

from slm_jax.bench.ceilings import device_here
from slm_jax.bench.child import output_of
from slm_jax.bench.peak import PeakMemory
from slm_jax.bench.result import Result
from slm_jax.bench.step import BenchStep, compile_step, with_known_vocabulary
from slm_jax.bench.train import StepTimer
from slm_jax.commands import set_up
from slm_jax.config import RunConfig, dump_config, parse_args, to_dict
from slm_jax.planning.plan import make_plan
from slm_jax.training.progress import format_bytes

_STEPS = 3


def bench_memory(config: RunConfig) -> Result:
    """Compare what a training step of a run takes as planned, as XLA says and as measured over three steps.

    On a CPU they are done in a fresh process, whose memory the compiler has not been in.

    Raises:
        InputError: what cannot be trained here.
    """
    config, notes = with_known_vocabulary(config)
    device = device_here()
    plan = make_plan(config, "cpu" if device is None else device.name, jax.device_count())
    planned = plan.by_remat[plan.remat].memory
    step = compile_step(config)
    peak = _measured_apart(config) if jax.default_backend() == "cpu" else measured_peak(step)
    bars = {"planned": planned.total, "XLA": float(step.planned_bytes), "measured": float(peak.n_bytes or 0)}
    return Result(
        what="memory",
        config=to_dict(config),
        figures={
            "planned_bytes": planned.total,
            "planned_parts": dataclasses.asdict(planned),
            "xla_bytes": step.planned_bytes or None,
            "measured_bytes": peak.n_bytes,
            "measured_of": peak.of,
            "devices": step.mesh.size,
            "limit_bytes": plan.memory_limit,
            "least_bytes": planned.parameters + planned.optimizer,
        },
        rows={
            "planned (slm-jax plan)": f"{format_bytes(planned.total)} a device",
            "XLA, of the compiled step": f"{format_bytes(step.planned_bytes)} a device",
            "measured": f"{format_bytes(peak.n_bytes)} of {peak.of}" if peak.n_bytes else "not known on this system",
            "parameters and optimizer alone": f"{format_bytes(planned.parameters + planned.optimizer)} a device",
        },
        unit="MB",
        bars={name: n_bytes / 1e6 for name, n_bytes in bars.items() if n_bytes},
        limits={"parameters and optimizer": (planned.parameters + planned.optimizer) / 1e6},
        notes=notes or step.notes,
    )


def measured_peak(step: BenchStep) -> PeakMemory:
    """Do some steps, from making the state on, and return the most memory that it took."""
    with PeakMemory() as memory:
        timer = StepTimer(step)
        for _ in range(_STEPS):
            timer.step_and_wait()
    return memory


def _measured_apart(config: RunConfig) -> PeakMemory:
    """Measure in a fresh process."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump_config(RunConfig(**fields)), encoding="utf-8")
        memory = PeakMemory()
        memory.n_bytes = json.loads(output_of(["-m", "slm_jax.bench.memory", str(file)]))
    return memory


def main(args: Sequence[str]) -> None:
    """Measure the recipe that is named; print the bytes, or null where the system does not say."""
    set_up()  # whose compile cache has what the process that asks has compiled just before
    print(json.dumps(measured_peak(compile_step(parse_args(["--config", *args]))).n_bytes))


if __name__ == "__main__":
    main(sys.argv[1:])
