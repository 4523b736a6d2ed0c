"""How fast the training step of a recipe is, beside what the device could do at most."""

import dataclasses
import itertools
import math
import time
from typing import Any, Literal

import jax

from slm_jax.config import to_dict
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.bench.ceilings import Ceilings, find_ceilings
from slm_jax.tools.bench.measure import Clock, Timing, time_calls
from slm_jax.tools.bench.peak import PeakMemory
from slm_jax.tools.bench.result import Result, bound_rows, format_flops
from slm_jax.tools.bench.step import BenchStep, compile_step, with_known_vocabulary
from slm_jax.training.progress import format_bytes
from slm_jax.training.sharding import put_batch
from slm_jax.training.step import StepMetrics

FORMULA = "(6 N + 12 layers · width · context) · tokens/s / (devices · peak), N without position embeddings"


def bench_train(
    config: RunConfig,
    *,
    warmup: int,
    repeats: int,
    device: str | None = None,
    peak: float | Literal["measured"] | None = None,
) -> Result:
    """Measure the training step of a run on random tokens.

    Args:
        config: the run's.
        warmup: steps that do not count.
        repeats: steps that do, in each of the two ways of timing them.
        device, peak: see :func:`slm_jax.tools.bench.ceilings.find_ceilings`.

    Raises:
        InputError: what cannot be trained here; an unknown device.
    """
    config, notes = with_known_vocabulary(config)
    step = compile_step(config)
    waiting, queued, loss, memory = _time_steps(step, warmup, repeats)
    ceilings = find_ceilings(step.cfg.dtype, device, peak)  # after the peak of memory, which it may exceed
    n_bytes, planned = memory.n_bytes, step.planned_bytes
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
    rows = {
        "compilation": f"{step.compile_seconds:.2f} s",
        "step, waited for": str(waiting),
        "step, queued as in train": str(queued),
        **_speed_rows(figures),
        **bound_rows(figures["bounds_seconds"], ceilings),
        "peak memory": f"{format_bytes(n_bytes)} of {memory.of}" if n_bytes else "not known on this system",
        "memory, as XLA says": f"{format_bytes(planned)} a device" if planned else "not known",
        "loss": f"{loss:.4f}" if math.isfinite(loss) else "not finite: lower --optimizer.learning_rate",
    }
    return Result(
        what="train",
        config=to_dict(config),
        figures=figures,
        rows=rows,
        unit="ms",
        series={
            name: _ms(timing.seconds) for name, timing in (("waited for", waiting), ("queued as in train", queued))
        },
        bars={"step, waited for": 1e3 * waiting.median, "step, queued": 1e3 * queued.median},
        limits={f"least by {name}": 1e3 * bound for name, bound in figures["bounds_seconds"].items()},
        notes=(*(notes or step.notes), f"MFU: {FORMULA}; limits: {ceilings.source}"),
    )


def _time_steps(step: BenchStep, warmup: int, repeats: int) -> tuple[Timing, Timing, float, PeakMemory]:
    """Return the times of steps that are waited for and of queued ones, the last loss, and the memory they took."""
    with PeakMemory() as memory:
        timer = StepTimer(step)
        waiting = time_calls(timer.step_and_wait, warmup=warmup, repeats=repeats)
        queued = timer.queue(repeats)
    return waiting, queued, timer.loss, memory


class StepTimer:
    """A training state, and steps of it that are timed."""

    def __init__(self, step: BenchStep, clock: Clock = time.perf_counter):
        self._step, self._clock = step, clock
        self._state, self._frozen = step.init()
        self._batch = put_batch(step.mesh, step.batch)
        self._metrics: StepMetrics | None = None

    @property
    def loss(self) -> float:
        """The loss of the last step; not a number before the first."""
        return math.nan if self._metrics is None else float(self._metrics.loss)

    def step_and_wait(self) -> None:
        """Do a step on a batch that is on the devices already, and wait for all that it gives."""
        self._state, self._metrics = self._step.compiled(self._state, self._frozen, self._batch)
        jax.block_until_ready((self._state, self._metrics))

    def queue(self, repeats: int) -> Timing:
        """Time steps as the training loop does them: a step is started, its batch put there, before the last is read.

        A step's time is from when the numbers of the one before it are read to when its own are.
        """
        read, previous = [], None
        for _ in range(repeats + 2):
            batch = put_batch(self._step.mesh, self._step.batch)
            self._state, self._metrics = self._step.compiled(self._state, self._frozen, batch)
            if previous is not None:
                jax.device_get(previous)
                read.append(self._clock())
            previous = self._metrics
        jax.block_until_ready(self._state)
        return Timing(tuple(after - before for before, after in itertools.pairwise(read)))


def speed_figures(step: BenchStep, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """Return what a step of so many seconds comes to: tokens a second, FLOP/s, MFU, and what limits it."""
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


def _speed_rows(figures: dict[str, Any]) -> dict[str, str]:
    achieved, mfu = figures["flops_per_second"], figures["mfu"]
    unknown = "not known for a part of a model" if achieved is None else None
    return {
        "tokens": f"{figures['tokens_per_second']:,.0f} a second ({figures['tokens_per_step']:,} a step)",
        "arithmetic": unknown or format_flops(achieved),
        "MFU": unknown or ("the peak is not known: --peak measured, or --peak FLOP/s" if mfu is None else f"{mfu:.1%}"),
    }


def _ms(seconds: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(1e3 * value for value in seconds)
