"""Resuming a run: which checkpoint it starts from, whether it is the same run, and the mirror of its checkpoints."""

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from slm_jax.config import shown
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import sha256, user_path
from slm_jax.training.bucket import BucketRun
from slm_jax.training.checkpoint import CHECKSUMS, best_step, find_damage, read_metadata, saved_steps
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.hardware import environment, rounding_changes
from slm_jax.training.run_folder import FROZEN, RunFolder

WARN_INTERVAL = 60.0  # seconds between two warnings about the mirror


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts."""

    folder: RunFolder
    step: int | None = None  # of the checkpoint to resume from; None: a new run
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # of that checkpoint
    notes: tuple[str, ...] = ()  # for the user, a line each
    saved: tuple[int, ...] = ()  # steps with a checkpoint in the folder, damaged or not

    @property
    def first_step(self) -> int:
        """Number of steps done."""
        return self.step or 0

    @property
    def last_kept(self) -> int:
        """The last step whose log is kept; -1: none."""
        return -1 if self.step is None else self.step

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run's folder; refuse one that another process has trained in since :func:`find_start`."""
        with self.folder.lock():
            if self.folder.writes and tuple(saved_steps(self.folder.checkpoints)) != self.saved:
                raise InputError(f"{self.folder.path}: another process has just trained this run; start again")
            yield

    def finished(self, total_steps: int) -> dict[str, Any] | None:
        """Return the summary of a run that has done all its steps; None: it has not."""
        summary = self.folder.read_json("summary.json")
        done = self.first_step >= total_steps and isinstance(summary, dict) and summary.get("step") == self.step
        return summary if done else None


def find_start(config: BaseRunConfig) -> Start:
    """Find the checkpoint to resume from: the latest whole one, copied from the mirror first if it is there."""
    run, mirror, several_hosts = RunFolder(config.folder), mirror_folder(config), jax.process_count() > 1
    for place in [run, mirror] if mirror else [run]:
        _check_place(place, config.resume)
    notes = _fetch(config, run, mirror) if mirror is not None and run.writes else []
    if several_hosts:
        multihost_utils.sync_global_devices("checkpoints are in place")
    step, metadata, damage = _latest(run) if run.writes else (-1, {}, [])  # one host verifies checkpoints
    if several_hosts:
        step = int(multihost_utils.broadcast_one_to_all(np.array(step)))
        _check_shared(run, step)
        metadata = metadata or (read_metadata(run.checkpoints, step) if step >= 0 else {})
    if config.resume == "must" and step < 0 and not damage:
        raise MissingInputError(f"{run.checkpoints}: no checkpoint to resume from, and resume is must; use auto")
    if step < 0 and damage:
        raise InputError(f"{run.checkpoints}: every checkpoint is damaged ({damage[-1]}); use another --run NAME")
    notes += [f"warning: {problem}; resuming from an earlier checkpoint" for problem in damage]
    if step >= 0:
        _check_config(config, run, metadata)
        notes += _move_warnings(metadata) + _decay_warnings(config, metadata, step, run)
    elif run.metrics("train"):
        notes.append(f"warning: {run.path} has a log but no checkpoint; the run starts from the beginning")
    return Start(run, None if step < 0 else step, metadata, tuple(notes), tuple(saved_steps(run.checkpoints)))


def _check_place(place: RunFolder | BucketRun, resume: str) -> None:
    path = place.path
    if isinstance(place, BucketRun):
        files = place.names()
        begun = bool(place.steps()) or "config.yaml" in files
    else:
        if place.path.exists() and not place.path.is_dir():
            raise InputError(f"{path} is a file; use another --run NAME")
        files = {file.name for file in place.path.iterdir()} if place.path.is_dir() else set()
        begun = bool(saved_steps(place.checkpoints)) or "config.yaml" in files
    if resume == "never" and begun:
        raise InputError(f"{path} already holds a run and resume is never; use another --run NAME or --resume auto")
    # What a killed start may leave, such as a lock, does not count.
    if not begun and any(not name.startswith(".") and not name.endswith(".partial") for name in files):
        raise InputError(f"{path} is not empty and holds no run; use another --run NAME")


def _check_shared(place: RunFolder, step: int) -> None:
    """Refuse a folder in which a host does not see the checkpoint of this step, the first host's (-1: none)."""
    saved = saved_steps(place.checkpoints)
    here = step if step in saved or place.writes else max(saved, default=-1)
    found = np.asarray(multihost_utils.process_allgather(np.array(here))).ravel()
    if len(set(found.tolist())) > 1:
        raise InputError(
            f"{place.path}: the hosts see different checkpoints ({', '.join(map(str, found))}; -1: none); expected "
            "runs_dir on a disk that all hosts share"
        )


def _latest(place: RunFolder) -> tuple[int, dict[str, Any], list[str]]:
    """Return step (-1: none) and metadata of the latest whole checkpoint, and what is damaged of later ones."""
    damage: list[str] = []
    for step in reversed(saved_steps(place.checkpoints)):
        try:
            if problem := find_damage(place.step_path(step)):
                raise InputError(problem)
            return step, read_metadata(place.checkpoints, step), damage
        except InputError as error:
            damage.append(str(error))
    return -1, {}, damage


def check_identity(place: RunFolder | BucketRun, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a checkpoint of another identity than this run's, naming the first key that differs."""
    for key in [*wanted, *(key for key in saved if key not in wanted)]:
        if saved.get(key) != wanted.get(key):
            difference = f"{key} is {shown(wanted.get(key))} now and was {shown(saved.get(key))}"
            if key == "data.sha256":
                difference = "the text of data.source has changed (a file, or for builtin: the Python version)"
            raise InputError(f"{place.path} holds another run: {difference}; change it back, or use another --run NAME")


def _check_config(config: BaseRunConfig, place: RunFolder | BucketRun, metadata: dict[str, Any]) -> None:
    """Refuse a checkpoint of other keys before any data is read; the model and the data are compared later."""
    saved = {key: value for key, value in metadata["identity"].items() if not key.startswith("model.")}
    check_identity(place, saved, {key: config.identity.get(key, saved[key]) for key in saved})


def _move_warnings(metadata: dict[str, Any]) -> list[str]:
    """Warn if the checkpoint is from a machine that rounds differently."""
    was, now = metadata.get("environment", {}), environment(jax.device_count())
    changed = rounding_changes(was, now)
    if not changed:
        return []
    then, here = (", ".join(f"{key} {values[key]}" for key in changed) for values in (was, now))
    return [f"warning: the checkpoint was made elsewhere ({then}; here {here}): the run resumes, but not bit for bit"]


def _decay_warnings(config: BaseRunConfig, metadata: dict[str, Any], step: int, run: RunFolder) -> list[str]:
    """Warn if more steps are asked of a run whose final decay has begun."""
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


# The mirror


def mirror_folder(config: BaseRunConfig) -> RunFolder | BucketRun | None:
    """Return the run's folder in ``checkpoint.mirror``, which may not exist yet; None without a mirror."""
    if config.mirror_url is not None:
        return _mirror_bucket(config.mirror_url)
    if config.checkpoint.mirror is None or config.mirror_folder is None:
        return None
    root, mirror = user_path(config.checkpoint.mirror), RunFolder(config.mirror_folder)
    there, here = mirror.path.resolve(), config.folder.resolve()
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise InputError(f"checkpoint.mirror is {root}; expected a folder apart from the run's own, {config.folder}")
    try:
        if mirror.writes:
            root.mkdir(exist_ok=True)  # not its parents: they are missing where a drive is not mounted
            mirror.path.parent.mkdir(parents=True, exist_ok=True)  # of a run called a/b
            tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise InputError(f"checkpoint.mirror is {root}: cannot write there ({error.strerror}); mount it") from None
    return mirror


def _mirror_bucket(url: str) -> BucketRun:
    mirror = BucketRun(url)
    try:
        if jax.process_index() == 0:
            mirror.check_writable()
    except OSError as error:
        remedy = "expected an existing bucket, and credentials that may write and remove objects in it"
        raise InputError(f"checkpoint.mirror: {url}: cannot write there ({error.strerror}); {remedy}") from None
    return mirror


def _fetch(config: BaseRunConfig, run: RunFolder, mirror: RunFolder | BucketRun) -> list[str]:
    """Copy the run from the mirror if the mirror has a later whole checkpoint; return notes."""
    if isinstance(mirror, BucketRun):
        try:
            return _fetch_from_bucket(config, run, mirror)
        except OSError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{mirror.path}: cannot be copied to {run.path} ({error.strerror}); try again") from None
    (here, ours, _), (there, theirs, damage) = _latest(run), _latest(mirror)
    if ours and theirs:
        check_identity(mirror, theirs["identity"], ours["identity"])
    if damage and here < 0 and there < 0:
        raise InputError(f"{mirror.checkpoints}: every checkpoint is damaged ({damage[-1]}); use another --run NAME")
    notes = [f"warning: {problem}; not used" for problem in damage]
    if there <= here:
        return notes
    _check_config(config, mirror, theirs)
    run.create()
    with run.lock():
        try:
            run.set_aside_after(there - 1)
            _copy_files(mirror, run, every=True)
            with suppress(InputError):  # a damaged one
                if (best := best_step(mirror.checkpoints)) is not None and best < there:
                    _copy_checkpoint(mirror, run, best)
            _copy_checkpoint(mirror, run, there)  # last: it makes the copy count
        except OSError as error:
            raise InputError(f"{mirror.path}: cannot be copied to {run.path} ({error.strerror}); try again") from None
    return [*notes, f"step {there:,} was copied from {mirror.path} to {run.path}"]


def _fetch_from_bucket(config: BaseRunConfig, run: RunFolder, mirror: BucketRun) -> list[str]:
    """Do the same for a mirror in object storage, where a checkpoint is only verified once it has been copied."""
    here, ours, _ = _latest(run)
    notes: list[str] = []
    for step in reversed(mirror.steps()):
        try:
            theirs = mirror.metadata(step)
        except (InputError, FileNotFoundError) as error:
            notes.append(f"warning: {error}; not used")
            continue
        if ours:
            check_identity(mirror, theirs["identity"], ours["identity"])
        if step <= here:
            return notes
        _check_config(config, mirror, theirs)
        run.create()
        with run.lock():
            if damage := mirror.fetch(run, step):
                notes.append(f"warning: {damage}; not used")
                continue
        return [*notes, f"step {step:,} was copied from {mirror.path} to {run.path}"]
    if notes and here < 0:
        raise InputError(f"{mirror.path}: every checkpoint is damaged ({notes[-1]}); use another --run NAME")
    return notes


class Mirror:
    """Copies a run to the folder ``target``, whose parent must exist, or to object storage; None: nothing is copied.

    There the latest ``keep`` checkpoints stay, beside the best and those of the run. Errors are warnings, at most one
    a minute, and the next update copies what is missing.
    """

    def __init__(self, run: RunFolder, target: RunFolder | BucketRun | None, keep: int, note: Callable[[str], None]):
        self._run, self._target, self._keep, self._note = run, target, keep, note
        self._last_warning = -math.inf

    def update(self, *, last: bool = False) -> None:
        """Copy what is missing or older there, the latest checkpoint first; the last update reports any failure."""
        if self._target is None:
            return
        try:
            if isinstance(self._target, BucketRun):
                self._target.update(self._run, self._keep)
            else:
                self._copy(self._target)
        except (OSError, InputError) as error:
            if last or time.monotonic() - self._last_warning > WARN_INTERVAL:
                self._last_warning = time.monotonic()
                reason = error.strerror if isinstance(error, OSError) else error
                self._note(f"warning: {self._target.path}: the run cannot be copied there now ({reason})")

    def _copy(self, target: RunFolder) -> None:
        target.path.mkdir(exist_ok=True)
        _copy_files(self._run, target)
        steps = saved_steps(self._run.checkpoints)
        for step in reversed(steps):
            ours, theirs = (place.step_path(step) / CHECKSUMS for place in (self._run, target))
            if ours.is_file() and not (theirs.is_file() and ours.read_bytes() == theirs.read_bytes()):
                _copy_checkpoint(self._run, target, step)
        kept = {*steps, *saved_steps(target.checkpoints)[-self._keep :], best_step(target.checkpoints)}
        for path in list(target.checkpoints.glob("*")):
            if path.suffix == ".partial" or (path.name.isdecimal() and int(path.name) not in kept):
                shutil.rmtree(path, ignore_errors=True)


def _copy_files(run: RunFolder, target: RunFolder, *, every: bool = False) -> None:
    """Copy the changed (or all) files of a run apart from checkpoints and folders of logs, the configuration first."""
    files = [path for path in [*run.path.iterdir(), *(run.path / "tokenizer").rglob("*")] if path.is_file()]
    files = [path for path in files if not path.name.startswith(".") and path.suffix != ".partial"]
    for source in sorted(files, key=lambda path: (path.name != "config.yaml", path)):  # which makes it count as a run
        copy = target.path / source.relative_to(run.path)
        was, now = copy.stat() if copy.is_file() else None, source.stat()
        if every or was is None or was.st_size != now.st_size or was.st_mtime < now.st_mtime:
            copy.parent.mkdir(exist_ok=True)
            partial = copy.with_name(f"{copy.name}.partial")
            shutil.copyfile(source, partial)
            if source.name == FROZEN and sha256(source) != sha256(partial):
                raise OSError(0, "the copy differs", str(partial))
            partial.replace(copy)


def _copy_checkpoint(run: RunFolder, target: RunFolder, step: int) -> None:
    """Copy a checkpoint, which gets its name only once the copy has been verified; replace an existing one."""
    source, goal = run.step_path(step), target.step_path(step)
    partial = goal.with_name(f"{step}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        target.checkpoints.mkdir(exist_ok=True)
        partial.mkdir()
        for file in sorted(source.rglob("*")):  # without permissions and times, which not every drive can store
            copy = partial / file.relative_to(source)
            copy.mkdir() if file.is_dir() else shutil.copyfile(file, copy)
        if damage := find_damage(partial):
            raise InputError(damage)
        shutil.rmtree(goal, ignore_errors=True)
        partial.rename(goal)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
