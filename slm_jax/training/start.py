"""Where a run starts: anew, or from a checkpoint of its folder or its mirror that is whole and of the same identity."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm_jax.errors import InputError, MissingInputError
from slm_jax.training.checkpoint import best_step, find_damage, read_metadata, saved_steps
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.identity import first_difference
from slm_jax.training.mirror import copy_checkpoint, copy_file, find_mirror, other_files
from slm_jax.training.run_folder import FROZEN, RunFolder
from slm_jax.training.summary import environment, rounding_changes
from slm_jax.weights.trees import read_tree


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: the run's.
        step: the checkpoint to go on from; None: from nothing.
        metadata: what that checkpoint says of its run; empty without one.
        warnings: what a person should know, a line each.
        saved: the steps that have a checkpoint in the run's folder, damaged or not.
        mirror: the run's folder in the mirror, where the checkpoint lies there; None: it lies in the run's own.
    """

    folder: RunFolder
    step: int | None
    metadata: dict[str, Any]
    warnings: tuple[str, ...] = ()
    saved: tuple[int, ...] = ()
    mirror: RunFolder | None = None

    @property
    def source(self) -> RunFolder:
        """The folder that the checkpoint lies in."""
        return self.mirror or self.folder

    def check_unchanged(self) -> None:
        """Refuse to go on if another process has trained in the folder since it was looked at.

        Raises:
            InputError: there are other checkpoints now.
        """
        if self.folder.writes and tuple(saved_steps(self.folder.checkpoints)) != self.saved:
            raise InputError(f"{self.folder.path}: another process has just trained this run; start again to go on")

    def fetched(self, identity: dict[str, Any], note: Callable[[str], None]) -> "Start":
        """Copy what lies in the mirror to the run's folder; return the same start from there.

        Args:
            identity: the run's, which that of the mirror must be.
            note: says a line to a person.

        Raises:
            InputError: the run in the mirror is of something else, or cannot be copied.
        """
        if self.mirror is not None:
            self.check_identity(identity)
            if self.folder.writes:
                self._fetch(self.mirror)
                note(f"step {self.step:,} was copied from {self.mirror.path} to {self.folder.path}")
        if jax.process_count() > 1:  # the others, which may have looked later, read it from the disk that they share
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("copied from the mirror")
        if self.mirror is None:
            return self
        return dataclasses.replace(self, mirror=None, saved=tuple(saved_steps(self.folder.checkpoints)))

    def _fetch(self, mirror: RunFolder) -> None:
        self.folder.create()
        with self.folder.lock():
            self.check_unchanged()
            try:
                self._copy(mirror)
            except OSError as error:
                raise InputError(
                    f"{mirror.path}: cannot be copied to {self.folder.path} ({error.strerror}); start again when both "
                    "can be used"
                ) from None

    def _copy(self, mirror: RunFolder) -> None:
        """Copy the run: last the checkpoint to go on from, which makes the copy count."""
        assert self.step is not None
        if (mirror.path / FROZEN).is_file():
            read_tree(mirror.path / FROZEN)  # refuses a damaged one before anything is written
        self.folder.set_aside_after(self.step - 1)
        for name in other_files(mirror.path):
            copy_file(mirror.path / name, self.folder.path / name)
        self.folder.checkpoints.mkdir(exist_ok=True)
        best = None
        with suppress(InputError):  # one that cannot be read
            best = best_step(mirror.checkpoints)
        if best is not None and best < self.step and not find_damage(mirror.checkpoints / str(best)):
            copy_checkpoint(mirror.checkpoints / str(best), self.folder.checkpoints / str(best))
        copy_checkpoint(mirror.checkpoints / str(self.step), self.folder.checkpoints / str(self.step))

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """The tokenizer of the run that goes on, as plain data."""
        return self.metadata.get("tokenizer")

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Refuse to go on if the run was of something else.

        Raises:
            InputError: naming the first key that differs.
        """
        difference = first_difference(self.metadata["identity"], identity) if self.step is not None else None
        if difference:
            raise InputError(
                f"{self.source.path} holds another run: {difference}; change it back, or start anew with --run NAME"
            )


def find_start(config: BaseRunConfig) -> Start:
    """Look at the run's folder, and at its mirror's, and decide where to start: at the latest whole checkpoint.

    Raises:
        InputError: ``resume`` forbids what is there; a folder holds something else; every checkpoint is damaged; the
            mirror cannot be written to, or holds another run than the run's folder; hosts see different checkpoints.
        MissingInputError: ``resume: must`` and nothing to go on from.
    """
    start = _find_start(config)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        step = -1 if start.step is None else start.step
        found = np.asarray(multihost_utils.process_allgather(np.array([step, start.mirror is not None])))
        if (found != found[0]).any():
            hosts = ", ".join(
                "none" if step < 0 else f"{step:,}{' in the mirror' * far}" for step, far in found.tolist()
            )
            raise InputError(
                f"{start.folder.path}: the hosts see different checkpoints ({hosts}); expected the same on each: mount "
                "runs_dir and checkpoint.mirror on all of them"
            )
    return start


def _find_start(config: BaseRunConfig) -> Start:
    run, mirror = RunFolder(config.folder), find_mirror(config)
    places = [run] if mirror is None else [run, mirror]
    for place in places:
        _check_place(place, config.resume)
    found = [(step, place) for place in places for step in saved_steps(place.checkpoints)]
    if config.resume == "must" and not found:
        where = " and ".join(str(place.checkpoints) for place in places)
        raise MissingInputError(f"{where}: no checkpoint to go on from, and resume is must; use --resume auto")
    warnings: list[str] = []
    for step, place in sorted(found, key=lambda item: item[0], reverse=True):  # of equal steps the run's own is first
        metadata, damage = _read(place, step)
        if damage is None:
            for other in places:
                if other is not place:
                    _check_same_run(metadata, place, other)
            warnings += _move_warnings(metadata) + _decay_warnings(config, metadata, step, place)
            saved = tuple(saved_steps(run.checkpoints))
            return Start(run, step, metadata, tuple(warnings), saved, None if place is run else place)
        warnings.append(f"{damage}; going back to an earlier checkpoint")
    if found:
        raise InputError(
            f"{found[-1][1].checkpoints}: every checkpoint is damaged ({damage}); start anew with --run NAME"
        )
    if run.metrics("train"):
        warnings.append(f"{run.path} has a log but no checkpoint; the run begins anew, and so does its log")
    return Start(run, None, {}, tuple(warnings))


def _check_place(place: RunFolder, resume: str) -> None:
    """Refuse a folder, the run's or its mirror's, that the run must not go on in."""
    path = place.path
    begun = bool(saved_steps(place.checkpoints)) or (path / "config.yaml").exists()
    if resume == "never" and begun:
        raise InputError(
            f"{path} already holds a run and resume is never; choose another name with --run, or go on with "
            "--resume auto"
        )
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; choose another name with --run")
    if not begun and path.is_dir() and any(map(_is_something, path.iterdir())):
        raise InputError(f"{path} is not empty and holds no run; choose another name with --run")


def _is_something(file: Path) -> bool:
    """Return whether a file is more than what a start that was killed may leave, such as a lock."""
    return not file.name.startswith(".") and not file.name.endswith(".partial")


def _read(place: RunFolder, step: int) -> tuple[dict[str, Any], str | None]:
    """Return a checkpoint's metadata, and what is damaged of it."""
    damage = find_damage(place.checkpoints / str(step))
    try:
        return ({} if damage else read_metadata(place.checkpoints, step)), damage
    except InputError as error:
        return {}, str(error)


def _check_same_run(metadata: dict[str, Any], place: RunFolder, other: RunFolder) -> None:
    """Refuse to take two runs for one: what the run's folder and its mirror hold must be of the same."""
    for step in reversed(saved_steps(other.checkpoints)):
        with suppress(InputError):  # raised for metadata that cannot be read: the step before tells, too
            there = read_metadata(other.checkpoints, step).get("identity", {})
            break
    else:
        return
    if difference := first_difference(there, metadata["identity"]):
        raise InputError(
            f"{other.path} holds another run than {place.path}: {difference} in the latter; choose another name with "
            "--run, or another checkpoint.mirror"
        )


def _move_warnings(metadata: dict[str, Any]) -> list[str]:
    """Say what the machine has differently from that of the checkpoint, if it decides how numbers are rounded."""
    was, now = metadata.get("environment", {}), environment(jax.device_count())
    changed = rounding_changes(was, now)
    if not changed:
        return []
    then, here = (", ".join(f"{key} {values[key]}" for key in changed) for values in (was, now))
    return [f"the checkpoint was made elsewhere ({then}; here {here}): the run goes on, but not bit for bit"]


def _decay_warnings(config: BaseRunConfig, metadata: dict[str, Any], step: int, place: RunFolder) -> list[str]:
    """Say that more steps were asked of a run whose final decay has begun already."""
    optimizer, was = config.optimizer, metadata["config"].get("train", {})
    total, more = was.get("steps"), config.train.steps
    if optimizer.schedule != "wsd" or None in (total, more) or was.get("epochs") or more <= total:
        return []
    stable = total - (max(1, total // 10) if optimizer.decay_steps is None else optimizer.decay_steps)
    if step <= stable:
        return []
    said = (
        f"the learning rate had been falling since step {stable:,} and rises to its peak again, as train.steps is "
        f"{more:,} now and was {total:,}"
    )
    before = [saved for saved in saved_steps(place.checkpoints) if saved <= stable]
    if not before:
        return [f"{said}; checkpoints from before the decay, to start a new run from, are kept by --checkpoint.keep"]
    base = f"--config {place.path / 'config.yaml'} --base {place.path}@{before[-1]} --base_optimizer true"
    return [f"{said}; smoother: slm-jax train {base} --optimizer.warmup_steps 0 --run NAME"]
