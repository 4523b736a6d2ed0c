"""``slm-jax train`` of a recipe: the speed and the memory of its step, the speed of its batches, and its start.

The step is the one that train compiles, and runs on random tokens. Text is read only where it decides how many token
ids there are, and may be absent.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax.config import dump_config, to_dict
from slm_jax.data.corpus import load_corpus
from slm_jax.errors import InputError
from slm_jax.files import cache_folder
from slm_jax.model import GPTConfig, Params, axis_sizes
from slm_jax.nn.sharding import state_shardings
from slm_jax.runs import RunFolder
from slm_jax.tasks.config import RunConfig, get_task
from slm_jax.tools.bench.instruments import (
    Ceilings,
    Clock,
    Peak,
    PeakMemory,
    Timing,
    find_ceilings,
    named_device,
    output_of,
    peak_memory,
    start_python,
    time_calls,
)
from slm_jax.tools.bench.result import Result
from slm_jax.tools.plan.estimate import Plan, Shapes, find_shapes, make_plan
from slm_jax.training.batch_size import filled_rows, fit_batch
from slm_jax.training.hardware import device_here, flops_per_token
from slm_jax.training.process import set_up
from slm_jax.training.program import compile_program, device_bytes, out_of_memory_as_input_error
from slm_jax.training.resume import Start
from slm_jax.training.sharding import describe_heads, host_rows, make_mesh, put_batch, row_shards
from slm_jax.training.step import Batch, StepMetrics, TrainState
from slm_jax.training.task import purpose_key

FORMULA = "(6 N + 12 layers · width · context) · tokens/s / (devices · peak), N without position embeddings"
_DOCUMENTS = 4  # of a packed row
_STEPS = 3  # whose memory is measured
_IMPORTS = """
import json, time
began = time.perf_counter()
import jax, flax
theirs = time.perf_counter()
import slm_jax
ours = time.perf_counter()
slm_jax.GPTModel, slm_jax.load_gpt2
print(json.dumps([theirs - began, ours - theirs, time.perf_counter() - ours]))
"""
STARTUP = (
    "import_jax_flax_seconds",
    "import_slm_jax_seconds",
    "first_use_slm_jax_seconds",
    "first_step_empty_cache_seconds",
    "first_step_warm_cache_seconds",
)
_POLL, _TOO_LONG = 0.01, 3600.0  # seconds between two looks at a run's log, and until its first step


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled training step."""

    cfg: GPTConfig
    mesh: Mesh
    compiled: Any  # (state, frozen, batch) -> (state, metrics); the state is donated
    compile_seconds: float  # tracing included
    init: Callable[[], tuple[TrainState, Params]]  # makes the state and the frozen parameters
    batch: Batch  # random tokens, on the host
    flops_per_token: float | None  # None if only a part is trained
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.batch["inputs"].size

    @property
    def moved_bytes(self) -> int | None:
        """The fewest bytes that a device moves: it reads the step's arguments and writes its results once."""
        memory = self.compiled.memory_analysis()
        return None if memory is None else memory.argument_size_in_bytes + memory.output_size_in_bytes


def compile_step(config: RunConfig) -> CompiledStep:
    """Compile the training step of a run of pretraining for the devices here, as the training loop does."""
    shapes = find_shapes(config)
    mesh = make_mesh(config.mesh)
    config, fitted = fit_batch(config, row_shards(mesh))
    began = time.perf_counter()
    program = compile_program(config, shapes, mesh)
    compiled = program.compiling[0].result()
    compile_seconds = time.perf_counter() - began
    program.wait()
    assert program.init is not None
    key, make_state = purpose_key(config.seed, "params"), program.init.result()
    make_frozen = jax.jit(shapes.make_frozen, out_shardings=state_shardings(mesh, shapes.params.frozen))
    return CompiledStep(
        cfg=shapes.cfg,
        mesh=mesh,
        compiled=compiled,
        compile_seconds=compile_seconds,
        init=lambda: (make_state(key), make_frozen(key)),
        batch=_random_batch(config, shapes),
        flops_per_token=None if shapes.params.frozen else flops_per_token(shapes.cfg),
        notes=(*shapes.notes, *describe_heads(config.mesh, axis_sizes(shapes.cfg)), *fitted),
    )


def _random_batch(config: RunConfig, shapes: Shapes) -> Batch:
    """Return a batch like the recipe's: random ids, every target counted, four documents in a packed row."""
    rows, seq, cfg = config.train.batch_size, shapes.seq, shapes.cfg
    n_ids = cfg.unpadded_vocab_size or cfg.vocab_size
    ids = np.random.default_rng(config.seed).integers(n_ids, size=(rows, seq + 1), dtype=np.int32)
    length, columns = -(-seq // _DOCUMENTS), np.arange(seq, dtype=np.int32)
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones((rows, seq), np.float32),
        "segment_ids": np.tile(columns // length + 1, (rows, 1)),
        "positions": np.tile(columns % length, (rows, 1)),
    }
    return {name: batch[name] for name in shapes.row}


class StepTimer:
    """A training state, and steps of it that are timed."""

    def __init__(self, step: CompiledStep, clock: Clock = time.perf_counter):
        self._step, self._clock = step, clock
        self._state, self._frozen = step.init()
        self._batch = put_batch(step.mesh, step.batch)
        self._metrics: StepMetrics | None = None

    @property
    def loss(self) -> float:
        return math.nan if self._metrics is None else float(self._metrics.loss)

    def step_and_wait(self) -> None:
        """Run a step on a batch that is on the devices already, and wait for all results."""
        self._state, self._metrics = self._step.compiled(self._state, self._frozen, self._batch)
        jax.block_until_ready((self._state, self._metrics))

    def queue(self, repeats: int) -> Timing:
        """Time steps as the training loop runs them, from one reading of metrics to the next, a step behind."""
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


def with_known_vocabulary(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """Set ``model.vocab_size``, with a note, where only the text has it; without the text plan's assumption stands."""
    section, tokenizer = config.model, config.tokenizer
    if section.vocab_size or config.base or tokenizer.path or tokenizer.kind not in ("char", "simple"):
        return config, ()
    try:
        n_ids = load_corpus(config.data, tokenizer).tokenizer.vocab_size
    except InputError:
        return config, ()
    note = f"{n_ids:,} token ids, counted in the text for the tokenizer {tokenizer.kind}"
    return dataclasses.replace(config, model=dataclasses.replace(section, vocab_size=n_ids)), (note,)


def measure_step(
    config: RunConfig, *, warmup: int, repeats: int, device: str | None = None, peak: Peak = None
) -> Result:
    """Measure the training step of a run on random tokens: ``repeats`` waited for one by one, and as many queued."""
    if device is not None:
        named_device(device)  # before anything is compiled
    config, notes = with_known_vocabulary(config)
    step = compile_step(config)
    with peak_memory() as memory:
        timer = StepTimer(step)
        waiting = time_calls(timer.step_and_wait, warmup=warmup, repeats=repeats)
        queued = timer.queue(repeats)
    ceilings = find_ceilings(step.cfg.dtype, device, peak)  # may take more memory, so after its peak
    is_finite = math.isfinite(timer.loss)
    figures = {
        "compile_seconds": step.compile_seconds,
        "step_seconds": waiting,
        "queued_step_seconds": queued,
        **speed_figures(step, queued.median, ceilings),
        "peak_bytes": memory.n_bytes,
        "peak_bytes_of": memory.of,
        "xla_bytes": device_bytes(step.compiled) or None,
        "loss": timer.loss if is_finite else None,
        "loss_finite": is_finite,
    }
    remarks = [f"MFU: {FORMULA}", f"peak memory: of {memory.of}"]
    if ceilings.flops is None:
        remarks[0] += "; unknown peak: pass --peak measured, or --peak FLOP/s"
    if not is_finite:
        remarks.append("the loss is not finite: lower --optimizer.learning_rate")
    return Result("train", to_dict(config), figures, (*(notes or step.notes), *remarks))


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
        "ceilings": ceilings,
        "mfu": achieved / (n_devices * ceilings.flops) if achieved and ceilings.flops else None,
        "mfu_formula": FORMULA,
        "bounds_seconds": ceilings.bounds(flops and flops / n_devices, step.moved_bytes),
    }


def measure_memory(config: RunConfig) -> Result:
    """Compare the planned memory of a training step with XLA's analysis and with the peak of three steps."""
    config, notes = with_known_vocabulary(config)
    plan = plan_here(config)
    planned = None if plan is None else plan.by_remat[plan.remat].memory
    step = compile_step(config)
    # On a CPU in a fresh process, which has not compiled anything.
    peak = peak_of_a_process(config) if jax.default_backend() == "cpu" else _measured_peak(step)
    figures = {
        "planned_bytes": planned and planned.total,
        "planned_parts": planned and dataclasses.asdict(planned),
        "xla_bytes": device_bytes(step.compiled) or None,
        "measured_bytes": peak.n_bytes,
        "measured_of": peak.of,
        "devices": step.mesh.size,
        "limit_bytes": plan and plan.memory_limit,
        "least_bytes": planned and planned.parameters + planned.optimizer,
    }
    return Result("memory", to_dict(config), figures, (*(notes or step.notes), f"measured: of {peak.of}"))


def plan_here(config: RunConfig) -> Plan | None:
    """Plan the run for the devices here; None: accelerators without a known data sheet."""
    known = device_here()
    if known is None and jax.default_backend() != "cpu":
        return None
    return make_plan(config, "cpu" if known is None else known.name, jax.device_count())


def _measured_peak(step: CompiledStep) -> PeakMemory:
    with peak_memory() as memory:
        timer = StepTimer(step)
        for _ in range(_STEPS):
            timer.step_and_wait()
    return memory


def peak_of_a_process(config: RunConfig) -> PeakMemory:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_compile_and_measure, config).result()
        except BrokenProcessPool:
            raise InputError("the process to measure in was killed; out of memory?") from None


def _compile_and_measure(config: RunConfig) -> PeakMemory:
    set_up()  # with the compile cache that has the step already
    with out_of_memory_as_input_error():
        return _measured_peak(compile_step(config))


def measure_batches(
    config: RunConfig, *, warmup: int, repeats: int, batches: int, step_ms: float | None = None
) -> Result:
    """Measure the batches of a run as the training loop reads them; ``step_ms`` of a step gives their share."""
    mesh = make_mesh(config.mesh)
    fitted, changes = fit_batch(config, row_shards(mesh))
    began = time.perf_counter()
    task = get_task(config.task).build(config, Start(RunFolder(config.folder), None, {}))
    ready_seconds = time.perf_counter() - began
    rows = host_rows(mesh, fitted.train.batch_size)
    source = filled_rows(task.train_batches, rows, config.train.batch_size)
    iterator = iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    reading = per_batch(iterator, warmup=warmup, repeats=repeats, batches=batches)
    batch = next(iterator)
    figures = {
        "ready_seconds": ready_seconds,
        "batch_seconds": reading,
        "batches_per_repeat": batches,
        "tokens_per_batch": task.tokens_per_step,
        "tokens_per_second": task.tokens_per_step / reading.median,
        "bytes_per_batch": sum(value.nbytes for value in batch.values()),
        "placing_seconds": time_calls(
            lambda: jax.block_until_ready(put_batch(mesh, batch)), warmup=warmup, repeats=repeats
        ),
        "step_ms": step_ms,
        "share_of_step": None if step_ms is None else 1e3 * reading.median / step_ms,
    }
    notes = ["One thread reads batches while the device computes: they cost time only beyond a whole step."]
    notes += changes
    if step_ms is None:
        notes.append("share of a step: pass --step_ms, from slm-jax bench train")
    return Result("data", to_dict(config), figures, tuple(notes))


def per_batch(
    iterator: Iterator[Any], *, warmup: int, repeats: int, batches: int, clock: Clock = time.perf_counter
) -> Timing:
    """Time reads of several batches, since single ones may be prefetched; return the seconds of one in each repeat."""
    timing = time_calls(
        lambda: sum(1 for _ in itertools.islice(iterator, batches)), warmup=warmup, repeats=repeats, clock=clock
    )
    return Timing(tuple(seconds / batches for seconds in timing.seconds))


def measure_startup(config: RunConfig, repeats: int) -> Result:
    """Measure imports, and ``slm-jax train`` of a recipe to its first step with an empty and a warm compile cache."""
    output_of(start_python(["-c", _IMPORTS]))  # fills the file system's cache
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            starts = [_seconds_to_first_step(config, Path(folder), run) for run in ("cold", "warm")]
        rows.append([*json.loads(output_of(start_python(["-c", _IMPORTS]))), *starts])
    figures = {name: Timing(seconds) for name, seconds in zip(STARTUP, zip(*rows, strict=True), strict=True)}
    note = "First step: from the start of the process to the line of step 1 in metrics.jsonl."
    return Result("startup", to_dict(config), figures, (note,))


def _seconds_to_first_step(config: RunConfig, folder: Path, run: str) -> float:
    """Start a run in a folder, with the compile cache there, and stop it after its first step."""
    config = dataclasses.replace(
        config,
        run=run,
        runs_dir=str(folder),
        resume="never",
        train=dataclasses.replace(config.train, log_every=1),
        checkpoint=dataclasses.replace(config.checkpoint, mirror=None),
    )
    recipe = folder / f"{run}.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    environ = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    with contextlib.suppress(OSError):  # no home
        environ.setdefault("SLM_JAX_DATA", str(cache_folder() / "data"))
    began = time.perf_counter()
    process = start_python(["-m", "slm_jax", "train", "--config", str(recipe)], environ)
    try:
        log = folder / run / "metrics.jsonl"
        while not (log.is_file() and '"train"' in log.read_text(encoding="utf-8")):
            if process.poll() is not None:
                output_of(process)  # raises
            if time.perf_counter() - began > _TOO_LONG:
                raise InputError(f"no first step within {_TOO_LONG:.0f} s; choose a smaller recipe with --config")
            time.sleep(_POLL)
        return time.perf_counter() - began
    finally:
        process.terminate()
        process.communicate()
