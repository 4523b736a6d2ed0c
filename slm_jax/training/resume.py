"""Resuming a run: find its latest intact checkpoint, and check that it belongs to the same run."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from slm_jax.config import flatten, shown
from slm_jax.errors import InputError, MissingInputError
from slm_jax.training.checkpoint import has_checksums, read_metadata
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.hardware import environment, rounding_changes
from slm_jax.training.manifest import find_damage, saved_steps
from slm_jax.training.mirror import Copy, FolderCopy, find_copy
from slm_jax.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts."""

    folder: RunFolder
    step: int | None = None  # step of the checkpoint to resume from; None: a new run
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # metadata of that checkpoint
    notes: tuple[str, ...] = ()  # lines for the user
    saved: tuple[int, ...] = ()  # steps with a checkpoint in the folder, damaged or not
    whole: tuple[int, ...] = ()  # steps with an intact checkpoint; only on the first host

    @property
    def first_step(self) -> int:
        """Number of steps done."""
        return self.step or 0

    @property
    def last_kept(self) -> int:
        """Last step whose log is kept; -1: none."""
        return -1 if self.step is None else self.step

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run's folder; refuse one that another process has trained in since :func:`find_start`."""
        with self.folder.lock():
            if self.folder.writes and tuple(saved_steps(self.folder.checkpoints)) != self.saved:
                raise InputError(f"{self.folder.path}: another process has just trained this run; start again")
            yield

    def finished(self, total_steps: int) -> dict[str, Any] | None:
        """Return the summary if the run has done all its steps, else None."""
        summary = self.folder.read_json("summary.json")
        done = self.first_step >= total_steps and isinstance(summary, dict) and summary.get("step") == self.step
        return summary if done else None


def find_start(config: BaseRunConfig, damaged: dict[int, str] | None = None) -> Start:
    """Find the latest intact checkpoint to resume from; if the mirror has a later one, copy that first.

    Several processes verify arrays only when they load them: ``damaged`` describes the damage found then, by step.
    """
    run, mirror, several_hosts = RunFolder(config.folder), find_copy(config), jax.process_count() > 1
    damaged = {} if damaged is None else damaged
    for place in [FolderCopy(run.path), *([mirror] if mirror else [])]:
        _check_place(place, config.resume)
    whole, damage = _verify(run, damaged) if run.writes else ([], {})  # one host verifies checkpoints
    notes: list[str] = []
    if mirror is not None and run.writes:
        copied, notes = _fetch(config, run, mirror, damaged, whole)
        whole, damage = _verify(run, damaged) if copied else (whole, damage)
    step = max(whole, default=-1)
    if several_hosts:
        step = int(multihost_utils.broadcast_one_to_all(np.array(step)))
        _check_shared(run, step)
    metadata = read_metadata(run.checkpoints, step) if step >= 0 else {}
    saved = tuple(saved_steps(run.checkpoints))
    if config.resume == "must" and step < 0 and not saved:
        raise MissingInputError(f"{run.checkpoints}: no checkpoint to resume from, and resume is must; use auto")
    if step < 0 and saved:
        problem = next(iter(damage.values()), "found by the first host")
        raise InputError(f"{run.checkpoints}: every checkpoint is damaged ({problem}); use another --run NAME")
    for at, problem in damage.items():
        notes.append(
            f"warning: {problem}; " + ("resuming from an earlier checkpoint" if 0 <= step < at else "set aside")
        )
    if step >= 0:
        _check_config(config, run.path, metadata)
        notes += [
            f"warning: {file} has changed since step {step:,} was saved; intact lines are kept"
            for file in run.changes(metadata.get("logs", {}))
        ]
        notes += _config_warnings(metadata, run)
        notes += _move_warnings(metadata) + _decay_warnings(config, metadata, step, run)
    elif run.metrics("train"):
        notes.append(f"warning: {run.path} has a log but no checkpoint; the run starts from the beginning")
    return Start(run, None if step < 0 else step, metadata, tuple(notes), saved, tuple(whole))


def _check_place(place: Copy, resume: str) -> None:
    files = place.names()
    begun = bool(place.steps()) or "config.yaml" in files
    if resume == "never" and begun:
        raise InputError(
            f"{place.path} already holds a run and resume is never; use another --run NAME or --resume auto"
        )
    # Leftovers of a killed start or a removed run, such as a lock or an empty folder, do not count.
    counts = [name for name in files if not name.startswith(".") and not name.endswith(".partial")]
    if not begun and counts not in ([], ["checkpoints"]):
        raise InputError(f"{place.path} is not empty and holds no run; use another --run NAME")


def _check_shared(place: RunFolder, step: int) -> None:
    """Refuse a folder in which a host does not see the checkpoint that the first host found (-1: none)."""
    saved = saved_steps(place.checkpoints)
    here = step if step in saved or place.writes else max(saved, default=-1)
    found = np.asarray(multihost_utils.process_allgather(np.array(here))).ravel()
    if len(set(found.tolist())) > 1:
        raise InputError(
            f"{place.path}: the hosts see different checkpoints ({', '.join(map(str, found))}; -1: none); expected "
            "runs_dir on a disk that all hosts share"
        )


def _verify(run: RunFolder, damaged: dict[int, str]) -> tuple[list[int], dict[int, str]]:
    """Return the steps of intact checkpoints, ascending, and the damage of the others by step, the latest first."""
    whole: list[int] = []
    damage: dict[int, str] = {}
    found = [path.name for path in run.checkpoints.iterdir()] if run.checkpoints.is_dir() else []
    for step in sorted({int(name) for name in found if name.isdecimal()}, reverse=True):
        path = run.step_path(step)
        try:
            if problem := damaged.get(step) or find_damage(path, arrays=not has_checksums(path)):
                raise InputError(problem)
            read_metadata(run.checkpoints, step)
            whole.insert(0, step)
        except InputError as error:
            damage[step] = str(error)
    return whole, damage


def _fetch(
    config: BaseRunConfig, run: RunFolder, mirror: Copy, damaged: dict[int, str], whole: list[int]
) -> tuple[bool, list[str]]:
    """Copy the run from the mirror if it has a later intact checkpoint; return whether it was copied, and notes."""
    here = max(whole, default=-1)
    notes: list[str] = []
    try:
        for step in reversed(mirror.steps()):
            try:
                theirs = mirror.metadata(step)
            except (InputError, FileNotFoundError) as error:
                notes.append(f"warning: {error}; not used")
                continue
            if whole:
                check_identity(mirror.path, theirs["identity"], read_metadata(run.checkpoints, here)["identity"])
            if step <= here:
                return False, notes
            _check_config(config, mirror.path, theirs)
            run.create()
            with run.lock():
                damage = mirror.fetch(run, step)
            if damage is None:
                damaged.pop(step, None)
                return True, [*notes, f"step {step:,} was copied from {mirror.path} to {run.path}"]
            notes.append(f"warning: {damage}; not used")
    except OSError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{mirror.path}: cannot be copied to {run.path} ({error.strerror}); try again") from None
    if notes and here < 0:
        raise InputError(f"{mirror.path}: every checkpoint is damaged ({notes[-1]}); use another --run NAME")
    return False, notes


def check_identity(place: Path | str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a checkpoint of a run with another identity, naming the first key that differs."""
    for key in [*wanted, *(key for key in saved if key not in wanted)]:
        if saved.get(key) != wanted.get(key):
            difference = f"{key} is {shown(wanted.get(key))} now and was {shown(saved.get(key))}"
            if key == "data.sha256":
                difference = "the text of data.source has changed (a file, or for builtin: the Python version)"
            raise InputError(f"{place} holds another run: {difference}; change it back, or use another --run NAME")


def _check_config(config: BaseRunConfig, place: Path | str, metadata: dict[str, Any]) -> None:
    """Refuse a checkpoint of another configuration before data are read; model and data are compared later."""
    saved = {key: value for key, value in metadata["identity"].items() if not key.startswith("model.")}
    check_identity(place, saved, {key: config.identity.get(key, saved[key]) for key in saved})


def _config_warnings(metadata: dict[str, Any], run: RunFolder) -> list[str]:
    """Warn if config.yaml lacks keys, as when it was cut at the end of a line: they would take their defaults."""
    file, found = run.path / "config.yaml", run.config()
    missing = [key for key in flatten(metadata["config"]) if key not in found]
    if not missing or not file.is_file():
        return []
    return [f"warning: {file} is damaged: {missing[0]} is missing; the file is rewritten with this command's keys"]


def _move_warnings(metadata: dict[str, Any]) -> list[str]:
    """Warn if the checkpoint is from a machine that rounds differently."""
    was, now = metadata.get("environment", {}), environment(jax.device_count())
    changed = rounding_changes(was, now)
    if not changed:
        return []
    then, here = (", ".join(f"{key} {values[key]}" for key in changed) for values in (was, now))
    where = f"in another environment ({then}; here {here})"
    return [f"warning: the checkpoint was saved {where}: the run resumes, but not bit for bit"]


def _decay_warnings(config: BaseRunConfig, metadata: dict[str, Any], step: int, run: RunFolder) -> list[str]:
    """Warn if more steps are requested for a run that is already in its final decay."""
    optimizer, was = config.optimizer, metadata["config"].get("train", {})
    total, more = was.get("steps"), config.train.steps
    if optimizer.schedule != "wsd" or None in (total, more) or was.get("epochs"):
        return []
    stable = total - (max(1, total // 10) if optimizer.decay_steps is None else optimizer.decay_steps)
    if more <= total or step <= stable:
        return []
    remedy = "raise --checkpoint.keep in a new run to keep a checkpoint from before the decay"
    if before := [saved for saved in saved_steps(run.checkpoints) if saved <= stable]:
        base = f"--config {run.path / 'config.yaml'} --base {run.path}@{before[-1]} --base_optimizer true"
        remedy = f"for a smooth curve use slm-jax train {base} --optimizer.warmup_steps 0 --run NAME"
    return [
        f"warning: the learning rate has been falling since step {stable:,} and rises to its peak again, as "
        f"train.steps is {more:,} now and was {total:,}; {remedy}"
    ]
