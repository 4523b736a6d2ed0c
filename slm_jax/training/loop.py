"""The training loop of every task.

Everything it does is a function of (configuration, seed, step), so that a killed run can resume, on a CPU bit for bit.
The loop dispatches the next step to the device before it reads the metrics of the last one.
"""

import dataclasses
import functools
import json
import time
from contextlib import ExitStack, closing
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from rich.console import Console

from slm_jax.config import dump_config, to_dict
from slm_jax.errors import SaveError
from slm_jax.model import Params, axis_sizes
from slm_jax.nn.blocks import merge_params
from slm_jax.nn.lora import split_adapters
from slm_jax.training.batch_size import filled_rows, fit_batch
from slm_jax.training.checkpoint import Checkpoints, best_step, check_disk, load_params
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.hardware import device_memory, environment
from slm_jax.training.loggers import check_loggers, open_loggers
from slm_jax.training.mirror import Mirror, find_copy
from slm_jax.training.process import Interrupted, StopRequest
from slm_jax.training.program import Program, abstract_state, compile_program, first_state
from slm_jax.training.progress import ProgressLine, count_leaves, format_bytes, format_duration, parameter_table
from slm_jax.training.record import PLOT_INTERVAL, RunLog, StepProfile
from slm_jax.training.resume import Start, check_identity
from slm_jax.training.run_folder import BEFORE, FROZEN, RunFolder
from slm_jax.training.sharding import describe_heads, host_rows, make_mesh, put_batch, put_params, row_shards
from slm_jax.training.step import TrainState
from slm_jax.training.task import REFERENCES, Moment, Task, purpose_key
from slm_jax.training.trainable import leaf_table
from slm_jax.weights.trees import tree_fingerprint, write_tree


def train(config: BaseRunConfig, task: Task, start: Start, stop: StopRequest, console: Console) -> dict[str, Any]:
    """Train to the last step, or until a stop is requested; return the run's summary.

    Raises:
        InputError: the folder holds another run or cannot be written, or keys do not fit together.
        Interrupted: a signal arrived; the current state was saved.
        TrainingDiverged: gradients were not finite in several steps in a row.
    """
    folder, total, keep = start.folder, task.total_steps, config.checkpoint.keep
    progress = ProgressLine(console, total, start.first_step)
    if start.step is not None:
        check_identity(folder.path, start.metadata["identity"], task.identity)
    mirror = Mirror(folder, find_copy(config) if folder.writes else None, keep, progress.note)
    if (summary := start.finished(total)) is not None:
        more = "raise --train.steps or --train.epochs to train longer, or use another --run NAME"
        progress.note(f"{folder.path} has done its {start.step:,} steps: {more}")
        mirror.update(last=True)
        return summary

    mesh = make_mesh(config.mesh)
    config, fitted = fit_batch(config, row_shards(mesh))
    check_loggers(config.logging)
    state_shapes = abstract_state(config, task, mesh)
    folder.create()
    check_disk(folder, state_shapes, task.params.frozen if start.step is None else {}, keep)
    with ExitStack() as stack:
        stack.enter_context(start.lock())
        stack.push(functools.partial(_name_removal, folder))
        stack.enter_context(jax.set_mesh(mesh))  # for kernels that the compiler cannot split over devices
        stack.callback(functools.partial(mirror.update, last=True))
        metadata = _describe(task, start, progress, state_shapes)  # first, because config.yaml makes the folder a run
        loggers = open_loggers(config, folder.path, start.last_kept) if folder.writes else []
        for logger in loggers:
            stack.callback(logger.close)
        log = RunLog(task, folder, progress, mesh.size, start.last_kept, loggers)
        for note in (*describe_heads(config.mesh, axis_sizes(task.model_config)), *fitted):
            progress.note(note)
        program = _compile(config, task, start, stop, progress, mesh)
        frozen = put_params(mesh, task.params.passed)
        profile = StepProfile(config.train.profile_steps if folder.writes else None, folder.path, progress.note)
        with Checkpoints(folder.checkpoints, keep, mirror.update) as checkpoints, closing(profile), progress:
            batches = _batches(task, start, host_rows(mesh, config.train.batch_size))
            run = Session(task, program, frozen, log, checkpoints, batches, profile, metadata)
            if start.step is None:
                state = first_state(config, task.params, program)
            else:
                progress.note(f"resuming from step {start.step:,} of {folder.path}")
                state = checkpoints.restore(start.step, program.state)
            try:
                if start.step is None and task.measures:
                    folder.write_text(BEFORE, json.dumps(run.measure(state.trainable, "before")) + "\n")
                run.hooks(state, start.first_step)
                for step in range(start.first_step + 1, total + 1):
                    batch = task.make_batch(next(run.batches), run.params(state.trainable), step)
                    state, metrics = program.train_step(state, frozen, put_batch(mesh, batch))
                    log.step(step, metrics)  # reads the previous step's metrics while the device computes this step
                    if stop.agreed(step):
                        raise Interrupted(stop.signum or 15)
                    run.hooks(state, step)
            except Interrupted:
                run.save_and_stop(state)
                raise
        return run.finish()


@dataclasses.dataclass(frozen=True)
class Session:
    """What the hooks of a run need."""

    task: Task
    program: Program
    frozen: Params
    log: RunLog
    checkpoints: Checkpoints
    batches: grain.DatasetIterator
    profile: StepProfile
    metadata: dict[str, Any]

    def hooks(self, state: TrainState, step: int) -> None:
        """Run the hooks that are due after a step; each skips work that an earlier start has done."""
        config = self.task.config
        samples = config.train.eval_every if self.task.samples_at_evaluation else config.sample.every
        cadence = (
            (samples if config.sample.every else 0, self.sample),
            (config.train.eval_every, self.evaluate),  # after sampling: it may save, and seals what was logged
            (config.checkpoint.every, self.save),
        )
        self.profile.at(step, functools.partial(jax.block_until_ready, state))
        due = [hook for every, hook in cadence if every and (step % every == 0 or step == self.task.total_steps)]
        if due:
            self.log.flush()
            for hook in due:
                self.program.stop()
                hook(state, step)
            self.log.draw(at_least_every=PLOT_INTERVAL)
            self.log.start_lap(step)

    def evaluate(self, state: TrainState, step: int) -> None:
        """Evaluate the validation split; save the state if it is the best so far."""
        if step not in self.log.validation:
            sums = self.program.evaluate(state.trainable, self.frozen, self.task.validation_batches())
            if self.log.evaluation(step, sums):
                self._save(state, step)

    def sample(self, state: TrainState, step: int) -> None:
        """Sample a text; before the first step, only if the model has a base."""
        if step not in self.log.sampled and (step or self.task.config.base):
            key = purpose_key(self.task.config.seed, "sampling", step)
            if (text := self.task.sample(self.params(state.trainable), key)) is not None:
                self.log.sample(step, text)

    def save(self, state: TrainState, step: int) -> None:
        """Save a checkpoint in the background."""
        if step not in self.checkpoints.saved_steps():
            self._save(state, step)

    def save_and_stop(self, state: TrainState) -> None:
        """Save the state at which a signal stopped the run."""
        self.log.flush()
        self.save(state, step := int(state.step))
        self.checkpoints.wait()
        self.log.draw()
        self.log.progress.note(f"stopped at step {step:,}; the same command resumes there")

    def finish(self) -> dict[str, Any]:
        """Measure the best checkpoint, which is the one that is loaded; write ``summary.json`` and print the result."""
        self.log.draw()
        folder, shapes = self.log.folder, self.program.state.trainable
        trained, whole = _count(self.task, shapes)
        counts = {"parameters": whole, "trained_parameters": trained}
        summary = {**self.log.summary(), "environment": self.metadata["environment"], **counts}
        step = best_step(folder.checkpoints)
        if self.task.measures and step is not None:
            best = load_params(folder.checkpoints, step, shapes, jax.tree.map(lambda leaf: leaf.sharding, shapes))
            after = self.measure(best, "after")
            self.log.test(step, {name: n for name, n in after["test"].items() if isinstance(n, int | float)})
            summary |= {"before": folder.read_json(BEFORE), "after": after}
        if folder.writes:
            folder.write_text("summary.json", json.dumps(summary, indent=1) + "\n")
            self.log.print_end(summary)
        return summary

    def measure(self, trainable: Params, moment: Moment) -> dict[str, Any]:
        """Return what the task measures before and after training."""
        evaluate = functools.partial(self.program.evaluate, trainable, self.frozen)
        path = self.log.folder.path if self.log.folder.writes else None
        return self.task.measure(self.params(trainable), evaluate, moment, path)

    def params(self, trainable: Params) -> Params:
        """Return all parameters of the model."""
        return merge_params({name: tree for name, tree in self.frozen.items() if name != REFERENCES}, trainable)

    def _save(self, state: TrainState, step: int) -> None:
        data = self.batches.get_state()
        folder = self.log.folder
        folder.check_lock()
        about = {**self.metadata, "data": data, "logs": folder.seal() if folder.writes else {}}
        self.checkpoints.save(state, about, self.log.validation.get(step))


def _name_removal(folder: RunFolder, kind: Any, error: BaseException | None, _: Any) -> None:
    """If a save failed because the run's folder was removed, which Orbax reports in many ways, say so."""
    if isinstance(error, SaveError) and not (folder.path / "config.yaml").is_file():
        raise SaveError(f"{folder.path}: was removed while it was being trained") from None


def _describe(task: Task, start: Start, progress: ProgressLine, state: TrainState) -> dict[str, Any]:
    """Write the files that describe the run; return the metadata for its checkpoints."""
    config, folder = task.config, start.folder
    folder.set_aside_all_but(start.whole)
    folder.write_text("config.yaml", dump_config(dataclasses.replace(config, run=config.name, resume="auto")))
    frozen_sha256 = start.metadata.get("frozen_sha256")
    if folder.writes:
        task.tokenizer.save(folder.path / "tokenizer")
        for name, text in task.files.items():
            folder.write_text(name, text)
        if start.step is None:
            (folder.path / FROZEN).unlink(missing_ok=True)  # left by an earlier attempt
            if task.params.frozen:
                frozen_sha256 = tree_fingerprint(write_tree(folder.path / FROZEN, task.params.frozen))
    for note in (*start.notes, *task.notes):
        progress.note(note)
    progress.console.print(parameter_table(state.trainable))
    if task.params.frozen:
        trained, whole = _count(task, state.trainable)
        progress.note(f"trained: {trained:,} of {whole:,} parameters ({config.trainable})")
    return {
        "config": to_dict(config),
        "model": dataclasses.asdict(task.model_config),
        "identity": task.identity,
        "tokenizer": task.tokenizer.to_dict(),
        "trainable": config.trainable,
        "leaves": leaf_table(state.trainable),
        "frozen_sha256": frozen_sha256,
        "environment": environment(jax.sharding.get_abstract_mesh().size),
        **task.metadata,
    }


def _count(task: Task, trainable: Params) -> tuple[int, int]:
    """Return the number of trained parameters, and of all parameters without adapters of frozen matrices."""
    trained = count_leaves(trainable)
    return trained, trained + count_leaves(split_adapters(task.params.frozen)[0])


def _compile(
    config: BaseRunConfig, task: Task, start: Start, stop: StopRequest, progress: ProgressLine, mesh: Mesh
) -> Program:
    began = time.monotonic()
    program = compile_program(config, task, mesh, needs_init=start.step is None, stop=stop.check)
    needed, there = program.wait(), device_memory()
    progress.note(
        f"compiled for {mesh.size} × {jax.devices()[0].device_kind} in {format_duration(time.monotonic() - began)}: "
        f"a step needs {format_bytes(needed)} per device" + (f" ({format_bytes(there)} available)" if there else "")
    )
    stop.check()
    return program


def _batches(task: Task, start: Start, rows: Int[np.ndarray, " rows"]) -> grain.DatasetIterator:
    """Return this host's rows of the training batches, from the first step on."""
    host_batches = filled_rows(task.train_batches, rows, task.config.train.batch_size)
    batches = iter(host_batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    if start.step is not None:
        batches.set_state(start.metadata["data"])
    return batches
