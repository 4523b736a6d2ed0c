"""The training loop of every stage.

Everything it does is a function of (configuration, seed, step): a run that is killed goes on, on a CPU
bit for bit. The loop hands the device the next step before it reads the numbers of the last one.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
from rich.console import Console

from slm_jax.config import dump_config, to_dict
from slm_jax.errors import InputError
from slm_jax.model import Params
from slm_jax.nn.blocks import merge_params
from slm_jax.nn.lora import split_adapters
from slm_jax.training import hardware
from slm_jax.training.checkpoint import Checkpoints, best_step, checkpoint_bytes, load_params, saved_steps
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.evaluate import Evaluator
from slm_jax.training.identity import identity
from slm_jax.training.interrupt import Interrupted, StopRequest
from slm_jax.training.loggers import check_loggers, open_loggers
from slm_jax.training.memory import check_fits, device_bytes
from slm_jax.training.mirror import Mirror
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.profile import StepProfile
from slm_jax.training.progress import ProgressLine, count_leaves, format_bytes, format_duration, parameter_table
from slm_jax.training.record import PLOT_INTERVAL, RunRecord
from slm_jax.training.run_folder import BEFORE, FROZEN, RunFolder
from slm_jax.training.sharding import (
    batch_sharding,
    check_batch_size,
    compiler_options,
    host_rows,
    make_mesh,
    put_batch,
    put_params,
    state_shardings,
)
from slm_jax.training.start import Start
from slm_jax.training.step import (
    Batch,
    CompiledByShape,
    StepMetrics,
    TrainState,
    compile_in_background,
    make_train_step,
)
from slm_jax.training.summary import environment, summarize, tell_end
from slm_jax.training.task import Moment, Task, purpose_key
from slm_jax.training.trainable import leaf_table
from slm_jax.weights.trees import tree_fingerprint, write_tree

MAX_SKIPPED = 3  # steps in a row without finite gradients after which training stops


class TrainingDiverged(RuntimeError):
    """Loss or gradients were not finite for several steps in a row."""


def train(config: BaseRunConfig, task: Task, start: Start, stop: StopRequest, console: Console) -> dict[str, Any]:
    """Train to the last step, or until a stop is asked for; return the run's summary.

    Raises:
        InputError: another run is in the folder; it cannot be written; something does not fit.
        Interrupted: a signal came; the state of that moment was saved.
        TrainingDiverged: three steps in a row without finite gradients.
    """
    trainer = Trainer(config, task, start, stop, console)
    trainer.fetch()
    if trainer.is_done():
        with trainer.mirror():  # which may have been away when the run ended
            return trainer.summary
    trainer.check()
    with start.folder.lock():
        trainer.start.check_unchanged()
        # The mesh is named for kernels that the compiler cannot divide among devices.
        with jax.set_mesh(trainer.mesh), trainer.mirror() as on_saved, trainer.loggers():
            trainer.prepare()
            keep = config.checkpoint.keep
            with Checkpoints(start.folder.checkpoints, keep, on_saved) as checkpoints, trainer.progress:
                trainer.run(checkpoints)
            trainer.record.draw()
            return trainer.finish()


class Trainer:
    """One run in this process: the compiled steps, the state, and what is due at which step."""

    def __init__(self, config: BaseRunConfig, task: Task, start: Start, stop: StopRequest, console: Console):
        self.config, self.task, self.stop, self.console = config, task, stop, console
        self.folder = start.folder
        self.start = start
        self.first_step = start.step or 0
        self.identity = {**identity(config, task.model_config), "data.sha256": task.fingerprint}
        self.mesh = make_mesh(config.mesh)
        self.optimizer = make_optimizer(config.optimizer)
        self.schedule = make_schedule(config.optimizer, task.total_steps)
        self.progress = ProgressLine(console, task.total_steps, self.first_step)
        self.record = RunRecord(config, task, start.folder, self.progress, self.mesh.size)
        steps = config.train.profile if start.folder.writes else None  # JAX expects one host's in a folder
        self.profile = StepProfile(steps, start.folder.path, self.progress.note)
        params = task.params
        self._init = params.init and jax.jit(params.init)  # traced once
        self.param_shapes = jax.eval_shape(self._init or (lambda _: params.trainable), jax.random.key(0))
        self.n_trained = count_leaves(self.param_shapes)
        self.n_params = self.n_trained + count_leaves(split_adapters(params.frozen)[0])  # without adapters' constants
        every = config.train.eval_every if task.samples_with_evaluation else config.sample.every
        self.sample_every = every if config.sample.every else 0
        self.skipped_in_a_row = 0

    def fetch(self) -> None:
        """Copy the run from its mirror, if it is there that it goes on from."""
        self.start = self.start.fetched(self.identity, self.progress.note)

    def is_done(self) -> bool:
        """Return whether the run has done its steps already, and say so; nothing is compiled or written then."""
        if self.first_step < self.task.total_steps:
            return False
        self.start.check_identity(self.identity)
        self.summary = self.folder.read_json("summary.json")
        # Else it was stopped between its last step and its summary.
        if not self.summary or self.summary.get("step") != self.first_step:
            return False
        self.progress.note(
            f"{self.folder.path} has done its {self.first_step:,} steps: raise --train.steps or --train.epochs to go "
            "on, or start anew with --run NAME"
        )
        return True

    def check(self) -> None:
        """Check everything that can be checked before the run's folder is changed.

        Raises:
            InputError: another run is there; the devices cannot share the batch; it cannot be written; a full disk.
        """
        self.start.check_identity(self.identity)
        check_batch_size(self.mesh.size, self.config.train.batch_size, self.config.train.accumulate)
        check_loggers(self.config.logging)
        self.folder.create()
        self._check_disk()

    def prepare(self) -> None:
        """Write the run's description, and compile."""
        config, task = self.config, self.task
        for warning in self.start.warnings:
            self.progress.note(f"warning: {warning}")
        self.folder.set_aside_after(self._kept_until)
        described = dataclasses.replace(config, run=config.name, resume="auto")
        self.folder.write_text("config.yaml", dump_config(described))
        self._save_files()
        self.frozen = put_params(self.mesh, task.params.frozen)
        for note in task.notes:
            self.progress.note(note)
        self.console.print(parameter_table(self.param_shapes))
        if self.frozen:
            self.progress.note(f"trained: {self.n_trained:,} of {self.n_params:,} parameters ({config.trainable})")
        self._compile()
        self.stop.check()

    @contextlib.contextmanager
    def mirror(self) -> Iterator[Callable[[int], None] | None]:
        """Copy the run to its mirror while it goes on; give what is to be told of each saved checkpoint."""
        target = self.config.mirror_folder
        if target is None or not self.folder.writes:
            yield None
            return
        with Mirror(self.folder, RunFolder(target), self.config.checkpoint.keep, self.progress.note) as mirror:
            yield mirror.checkpoint_saved

    @contextlib.contextmanager
    def loggers(self) -> Iterator[None]:
        """Begin the run's record, with the loggers that it asks for open."""
        loggers = open_loggers(self.config, self.folder.path, self._kept_until) if self.folder.writes else []
        self.record.begin(self._kept_until, loggers)
        with contextlib.ExitStack() as stack:
            for logger in loggers:
                stack.callback(logger.close)
            yield

    @property
    def _kept_until(self) -> int:
        return -1 if self.start.step is None else self.first_step

    def _save_files(self) -> None:
        """Write what the run needs to be whole without its base, and nothing of an earlier attempt is left."""
        self.frozen_fingerprint = self.start.metadata.get("frozen_sha256")
        if not self.folder.writes:
            return
        self.task.tokenizer.save(self.folder.path / "tokenizer")
        for name, text in self.task.files.items():
            self.folder.write_text(name, text)
        if self.start.step is None:
            file = self.folder.path / FROZEN
            file.unlink(missing_ok=True)
            if self.task.params.frozen:
                self.frozen_fingerprint = tree_fingerprint(write_tree(file, self.task.params.frozen))

    def _check_disk(self) -> None:
        bytes_each = checkpoint_bytes(self.param_shapes, self.optimizer)
        # The latest, the best and the one being written, less those that are there already.
        missing = self.config.checkpoint.keep + 2 - len(saved_steps(self.folder.checkpoints))
        needed = bytes_each * max(1, missing)
        if self.start.step is None:
            needed += sum(leaf.nbytes for leaf in jax.tree.leaves(self.task.params.frozen))
        free = shutil.disk_usage(self.folder.path).free if self.folder.writes else needed
        if free < needed:
            raise InputError(
                f"{self.folder.path}: {format_bytes(free)} free, but checkpoints of {format_bytes(bytes_each)} need "
                f"{format_bytes(needed)} more; free some, lower --checkpoint.keep, or choose another place with "
                "--runs_dir"
            )

    def _compile(self) -> None:
        """Compile the training and evaluation steps for their exact shapes, and say what memory they take."""
        config, task = self.config, self.task
        self.abstract_state = self._with_sharding(jax.eval_shape(self._initial_state, self.param_shapes))
        batch = self._abstract_batch(config.train.batch_size)
        train_step = make_train_step(task.loss_fn, self.optimizer, self.schedule, config.train.accumulate)
        began = time.monotonic()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        options = compiler_options(jax.default_backend(), self.mesh.size)
        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
        self.train_step = CompiledByShape(jitted, self.abstract_state, self.frozen)
        rows = config.train.eval_batch_size or config.train.batch_size
        trainable = self.abstract_state.trainable
        self.evaluate = Evaluator(task.loss_fn, self.mesh, trainable, self.frozen, rows, self.stop.check)
        compiling = [self.train_step.begin(batch), self.evaluate.begin(self._abstract_batch(self.evaluate.rows))]
        if self.start.step is None and self._init:
            new_state = jax.jit(self._new_state, out_shardings=shardings)
            self.new_state = compile_in_background(new_state.lower(purpose_key(config.seed, "params")))
        train_step_bytes, eval_step_bytes = (device_bytes(step.result()) for step in compiling)
        needed, there = max(train_step_bytes, eval_step_bytes), hardware.device_memory()
        self.progress.note(
            f"compiled for {self.mesh.size} × {jax.devices()[0].device_kind} in "
            f"{format_duration(time.monotonic() - began)}: a step takes {format_bytes(needed)} a device"
            + (f" of {format_bytes(there)}" if there else "")
        )
        check_fits(needed, there)

    def _abstract_batch(self, rows: int) -> Batch:
        """Return the shapes of the widest batch."""
        example = self.task.train_batches[0]
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(
                (rows, *(self.task.longest or width for width in value.shape[1:])), value.dtype, sharding=sharding
            )
            for name, value in example.items()
        }

    def _new_state(self, key: jax.Array) -> TrainState:
        assert self._init is not None
        return self._initial_state(self._init(key))

    def _initial_state(self, params: Params) -> TrainState:
        key = purpose_key(self.config.seed, "dropout")
        return TrainState(jnp.int32(0), params, self.optimizer.init(params), key)

    def _with_sharding(self, shapes: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            state_shardings(self.mesh, shapes),
        )

    def run(self, checkpoints: Checkpoints) -> None:
        """Do every step that is left; on a stop, save and raise :class:`Interrupted`."""
        state = self._restore_or_init(checkpoints)
        step = self.first_step
        batches = self._batches(step)
        previous: tuple[int, StepMetrics] | None = None
        self.record.start_lap(step)
        try:
            while True:
                self.profile.at(step, functools.partial(jax.block_until_ready, state))
                if self._due(step):
                    self._read(previous)
                    previous = None
                    self._report(checkpoints, state, step, batches)
                    self.record.start_lap(step)
                if step >= self.task.total_steps:
                    break
                state, metrics = self.train_step(state, self.frozen, put_batch(self.mesh, next(batches)))
                step += 1
                self._read(previous)  # of the step before: the device is busy with this one already
                previous = (step, metrics)
                if self.stop.agreed(step):
                    raise Interrupted(self.stop.signum or 15)
        except Interrupted:
            self._read(previous)
            if step not in checkpoints.saved_steps():
                self._save(checkpoints, state, step, batches)
            checkpoints.wait()
            self.record.draw()
            self.progress.note(f"stopped at step {step:,}; the same command goes on from there")
            raise
        finally:
            self.profile.end()

    def _restore_or_init(self, checkpoints: Checkpoints) -> TrainState:
        if self.start.step is None and self._init:
            return self.new_state.result()(purpose_key(self.config.seed, "params"))
        if self.start.step is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
            params = put_params(self.mesh, self.task.params.trainable)
            state = jax.jit(self._initial_state, out_shardings=shardings, donate_argnums=0)(params)
            opt_state = self.task.params.opt_state
            return state if opt_state is None else state.replace(opt_state=put_params(self.mesh, opt_state))
        self.progress.note(f"going on from step {self.first_step:,} of {self.folder.path}")
        return checkpoints.restore(self.start.step, self.abstract_state)

    def _batches(self, step: int) -> grain.DatasetIterator:
        rows = host_rows(self.config.train.batch_size)
        host_batches = self.task.train_batches.map(lambda batch: {key: value[rows] for key, value in batch.items()})
        batches = iter(host_batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        if self.start.step is not None:
            batches.set_state(self.start.metadata["data"])
        return batches

    def _due(self, step: int) -> bool:
        cfg = self.config
        cadences = (cfg.train.eval_every, cfg.checkpoint.every, self.sample_every)
        return step == self.task.total_steps or any(every and step % every == 0 for every in cadences)

    def _report(self, checkpoints: Checkpoints, state: TrainState, step: int, batches: grain.DatasetIterator) -> None:
        """Evaluate, sample and save, each if it is due at this step and has not been done."""
        cfg, last = self.config, step == self.task.total_steps
        best = False
        if step == 0 and self.start.step is None:  # so that it lies beside the first checkpoint
            self._measure_before(state)
        if (step % cfg.train.eval_every == 0 or last) and step not in self.record.validation:
            best = self.record.evaluation(step, self.evaluate(state.trainable, self.task.validation_batches()))
        # Before the first step only a model that has a base has something to say.
        every = self.sample_every
        sample_due = every and (step or cfg.base) and (step % every == 0 or last)
        if self.task.sample and sample_due and step not in self.record.sampled:
            key = jax.random.fold_in(purpose_key(cfg.seed, "sampling"), step)
            self.record.sample(step, self.task.sample(self._all_params(state.trainable), key))
        self.stop.check()
        saved = checkpoints.saved_steps()
        if best or ((step % cfg.checkpoint.every == 0 or last) and step not in saved):
            self._save(checkpoints, state, step, batches)
        self.record.draw(at_least_every=PLOT_INTERVAL)

    def _all_params(self, trainable: Params) -> Params:
        return merge_params(self.frozen, trainable)

    def _measure(self, trainable: Params, moment: Moment) -> dict[str, Any]:
        """Let the task measure the model."""
        assert self.task.measure is not None
        evaluate = functools.partial(self.evaluate, trainable)
        folder = self.folder.path if self.folder.writes else None
        return self.task.measure(self._all_params(trainable), evaluate, moment, folder)

    def _measure_before(self, state: TrainState) -> None:
        if self.task.measure:
            self.folder.write_text(BEFORE, json.dumps(self._measure(state.trainable, "before")) + "\n")

    def _measure_after(self) -> dict[str, Any]:
        """Measure the best checkpoint, which is what everything takes that loads the run."""
        if self.task.measure is None:
            return {}
        step = best_step(self.folder.checkpoints)
        assert step is not None
        shapes = self.abstract_state.trainable
        shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        best = load_params(self.folder.checkpoints, step, shapes, shardings)
        after = self._measure(best, "after")
        figures = {name: value for name, value in after["test"].items() if isinstance(value, int | float)}
        self.record.test(step, figures)
        return {"before": self.folder.read_json(BEFORE), "after": after}

    def _save(self, checkpoints: Checkpoints, state: TrainState, step: int, batches: grain.DatasetIterator) -> None:
        metadata = {
            "config": to_dict(self.config),
            "model": dataclasses.asdict(self.task.model_config),
            "identity": self.identity,
            "tokenizer": self.task.tokenizer.to_dict(),
            "trainable": self.config.trainable,
            "leaves": leaf_table(self.param_shapes),
            "frozen_sha256": self.frozen_fingerprint,
            "data": batches.get_state(),
            "environment": environment(self.mesh.size),
            **self.task.metadata,
        }
        checkpoints.save(state, metadata, self.record.validation.get(step))

    def _read(self, previous: tuple[int, StepMetrics] | None) -> None:
        """Read a step's numbers, which waits for that step; log and show them, and count skipped steps."""
        if previous is None:
            return
        step, metrics = previous[0], jax.device_get(previous[1])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics.skipped else 0
        if metrics.skipped or step % self.config.train.log_every == 0 or step == self.task.total_steps:
            self.record.train(step, metrics)
        if metrics.skipped:
            self.progress.note(f"step {step:,}: loss {metrics.loss}, gradient norm {metrics.grad_norm}: skipped")
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise TrainingDiverged(
                f"loss or gradients were not finite in the {MAX_SKIPPED} steps up to {step:,}; parameters are still "
                f"those of step {step - MAX_SKIPPED:,}: lower --optimizer.learning_rate, lengthen "
                "--optimizer.warmup_steps or lower --optimizer.clip_norm, and start anew with --run NAME"
            )

    def finish(self) -> dict[str, Any]:
        """Write ``summary.json``; say what was written, where, and what to try next."""
        summary = {
            **summarize(self.config, self.folder, self.record.validation, self.record.seconds(), self.mesh.size),
            "parameters": self.n_params,
            "trained_parameters": self.n_trained,
            **self._measure_after(),
        }
        if self.folder.writes:
            self.folder.write_text("summary.json", json.dumps(summary, indent=1) + "\n")
            if self.task.report:
                for line in self.task.report(summary["before"], summary["after"]):
                    self.progress.note(line)
            tell_end(self.progress, self.folder, summary, self.task.next_commands)
        return summary
