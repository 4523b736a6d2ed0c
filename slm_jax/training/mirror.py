"""``checkpoint.mirror``: a copy of a run in a second folder or in object storage, from which a new machine can resume.

A copy has the same file names as the run's folder. In a folder, a checkpoint is renamed to its step once the copy has
been verified. Object storage has no folders and no renames: there a checkpoint counts if its ``sha256.json`` exists,
which is written last and removed first.
"""

import abc
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import jax

from slm_jax.errors import InputError
from slm_jax.files import Bucket, sha256, user_path
from slm_jax.training.checkpoint import lowest, parse_metadata, read_metadata
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.manifest import CHECKSUMS, METADATA, REMOVED, commit, discard, find_damage, saved_steps, sync_tree
from slm_jax.training.run_folder import FROZEN, RunFolder

WARN_INTERVAL = 60.0  # seconds between two warnings


class Copy(abc.ABC):
    """A copy of a run at ``path``. Failures are OSErrors.

    InputError: something else is there, or a package is missing.
    """

    path: Path | str

    @abc.abstractmethod
    def names(self) -> set[str]:
        """Return the names of its files and folders; empty if it does not exist."""

    @abc.abstractmethod
    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""

    @abc.abstractmethod
    def metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata of a checkpoint, as :func:`slm_jax.training.checkpoint.read_metadata` does."""

    @abc.abstractmethod
    def update(self, run: RunFolder, keep: int) -> None:
        """Copy what is missing or older here, the latest checkpoint first, and remove old checkpoints.

        The latest ``keep``, the best, and those that the run still has are kept.
        """

    @abc.abstractmethod
    def _read_checkpoint(self, step: int, folder: Path) -> str | None:
        """Copy a checkpoint to a new folder; return a description of any damage."""

    @abc.abstractmethod
    def _read_files(self, run: RunFolder) -> None:
        """Copy all files except checkpoints, the configuration first."""

    def best_step(self) -> int | None:
        """Return the step with the lowest validation loss, ignoring damaged metadata."""
        losses = {}
        for step in self.steps():
            with suppress(InputError):
                losses[step] = self.metadata(step)["validation_loss"]
        return lowest(losses)

    def fetch(self, run: RunFolder, step: int) -> str | None:
        """Copy a checkpoint, the best one and the files to a run.

        If the checkpoint is damaged, nothing is copied, and a description of the damage is returned. The checkpoint is
        renamed to its step last, after its SHA-256 have been verified.
        """
        copy, best_copy = run.path / ".mirror.partial", run.path / ".best.partial"  # hidden: not a run yet
        try:
            if damage := self._read_checkpoint(step, copy):
                return damage
            run.set_aside_all_but(range(step))  # damaged ones
            self._read_files(run)
            run.checkpoints.mkdir(exist_ok=True)
            best = self.best_step()
            if best is not None and best < step and not self._read_checkpoint(best, best_copy):
                commit(best_copy, run.step_path(best))
            commit(copy, run.step_path(step))
            return None
        finally:
            for folder in (copy, best_copy):
                shutil.rmtree(folder, ignore_errors=True)


class FolderCopy(Copy):
    """A copy in a folder, such as on a mounted drive; its parent must exist."""

    def __init__(self, path: Path):
        self.path: Path = path
        self._run = RunFolder(path)

    def names(self) -> set[str]:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; use another --run NAME")
        self._run.check_links()
        return {file.name for file in self.path.iterdir()} if self.path.is_dir() else set()

    def steps(self) -> list[int]:
        return saved_steps(self._run.checkpoints)

    def metadata(self, step: int) -> dict[str, Any]:
        return read_metadata(self._run.checkpoints, step)

    def update(self, run: RunFolder, keep: int) -> None:
        self.path.mkdir(exist_ok=True)
        _copy_files(run, self._run)
        steps, folder = saved_steps(run.checkpoints), self._run.checkpoints
        for step in reversed(steps):
            ours, theirs = (place.step_path(step) / CHECKSUMS for place in (run, self._run))
            if ours.is_file() and not (theirs.is_file() and ours.read_bytes() == theirs.read_bytes()):
                self._add(run.step_path(step))
        kept = {*steps, *self.steps()[-keep:], self.best_step()}
        for path in list(folder.glob("*")):
            unfinished = path.suffix == ".partial" or path.name.startswith(REMOVED)
            if unfinished or (path.name.isdecimal() and int(path.name) not in kept):
                discard(path)

    def _add(self, checkpoint: Path) -> None:
        goal = self._run.checkpoints / checkpoint.name
        partial = goal.with_name(f"{goal.name}.partial")
        try:
            goal.parent.mkdir(exist_ok=True)
            if damage := _copy_checkpoint(checkpoint, partial):
                raise InputError(damage)
            commit(partial, goal)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _read_checkpoint(self, step: int, folder: Path) -> str | None:
        return _copy_checkpoint(self._run.step_path(step), folder)

    def _read_files(self, run: RunFolder) -> None:
        _copy_files(self._run, run, every=True)


def _copy_files(run: RunFolder, target: RunFolder, *, every: bool = False) -> None:
    """Copy the changed (or all) files of a run except checkpoints and folders of logs, the configuration first."""
    for name, source in _files(run).items():
        copy = target.path / name
        was, now = copy.stat() if copy.is_file() else None, source.stat()
        if every or was is None or was.st_size != now.st_size or was.st_mtime < now.st_mtime:
            copy.parent.mkdir(exist_ok=True)
            partial = copy.with_name(f"{copy.name}.partial")
            shutil.copyfile(source, partial)
            if source.name == FROZEN and sha256(source) != sha256(partial):
                raise OSError(0, "the copy differs", str(partial))
            partial.replace(copy)


def _copy_checkpoint(source: Path, folder: Path) -> str | None:
    """Copy a checkpoint to a new folder; return a description of any damage."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in sorted(source.rglob("*")):  # without permissions and times, which some drives cannot store
        copy = folder / file.relative_to(source)
        copy.mkdir() if file.is_dir() else shutil.copyfile(file, copy)
    sync_tree(folder)
    damage = find_damage(folder, step=int(source.name))
    return damage and damage.replace(f"{folder}/", f"{source}/")


def _files(run: RunFolder) -> dict[str, Path]:
    """Return the files of a run by name, without checkpoints and folders of logs.

    The configuration comes first, because it makes a folder count as a run.
    """
    files = [path for path in [*run.path.iterdir(), *(run.path / "tokenizer").rglob("*")] if path.is_file()]
    files = [path for path in files if not path.name.startswith(".") and path.suffix != ".partial"]
    return {
        path.relative_to(run.path).as_posix(): path
        for path in sorted(files, key=lambda path: (path.name != "config.yaml", path))
    }


class BucketCopy(Copy):
    """A copy in object storage; ``path`` is its URL, such as ``gs://bucket/runs/tiny``."""

    def __init__(self, url: str):
        self.path: str = url
        self._bucket = Bucket(url)
        self._uploaded: dict[str, tuple[int, int]] = {}  # size and time of each file when it was copied

    def names(self) -> set[str]:
        return {name.partition("/")[0] for name in self._bucket.sizes()}

    def steps(self) -> list[int]:
        return _steps(self._bucket.sizes())

    def metadata(self, step: int) -> dict[str, Any]:
        name = f"checkpoints/{step}/{METADATA}"
        return parse_metadata(self._bucket.read(name), f"{self.path}/{name}")

    def update(self, run: RunFolder, keep: int) -> None:
        self._upload_files(run)
        steps, there = saved_steps(run.checkpoints), self._bucket.sizes()
        for step in reversed(steps):
            sums, name = run.step_path(step) / CHECKSUMS, f"checkpoints/{step}/{CHECKSUMS}"
            if sums.is_file() and (name not in there or self._bucket.read(name) != sums.read_bytes()):
                self._upload_checkpoint(run.step_path(step), step)
        there = self._bucket.sizes()
        kept = {*steps, *_steps(there)[-keep:], self.best_step()}
        for other in {_step_of(name) for name in there} - kept:
            if other is not None:
                self._remove_checkpoint(other, there)

    def _upload_files(self, run: RunFolder) -> None:
        there, changed, seen = self._bucket.sizes(), {}, {}
        for name, path in _files(run).items():
            about = path.stat()
            seen[name] = about.st_size, about.st_mtime_ns
            if name in self._uploaded:
                is_changed = self._uploaded[name] != seen[name]
            else:
                is_changed = there.get(name) != about.st_size or self._bucket.is_older(name, about.st_mtime)
            if is_changed:
                changed[name] = path
        with tempfile.TemporaryDirectory() as folder:  # for copies: the log may grow during the upload
            for i, name in enumerate(changed):
                if name != FROZEN:
                    changed[name] = Path(shutil.copyfile(changed[name], Path(folder) / str(i)))
            if "config.yaml" in changed:  # first, because it makes the copy count as a run
                self._bucket.upload({"config.yaml": changed.pop("config.yaml")})
            self._bucket.upload(changed)
        self._uploaded |= seen

    def _upload_checkpoint(self, folder: Path, step: int) -> None:
        files = {
            f"checkpoints/{step}/{path.relative_to(folder).as_posix()}": path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self._remove_checkpoint(step, self._bucket.sizes())
        sums = f"checkpoints/{step}/{CHECKSUMS}"
        last = {sums: files.pop(sums)}
        self._bucket.upload(files)
        self._bucket.upload(last)

    def _remove_checkpoint(self, step: int, there: dict[str, int]) -> None:
        names = [name for name in there if _step_of(name) == step]
        for name in sorted(names, key=lambda name: (PurePosixPath(name).name != CHECKSUMS, name)):
            self._bucket.remove(name)

    def _read_files(self, run: RunFolder) -> None:
        names = [name for name in self._bucket.sizes() if "/" not in name or name.startswith("tokenizer/")]
        names = [name for name in names if _is_inside(name) and not name.startswith(".")]
        copies = {name: run.path / f"{name}.partial" for name in names}
        self._bucket.download(copies)
        for name in sorted(names, key=lambda name: (name != "config.yaml", name)):
            copies[name].replace(run.path / name)

    def _read_checkpoint(self, step: int, folder: Path) -> str | None:
        shutil.rmtree(folder, ignore_errors=True)
        start = f"checkpoints/{step}/"
        names = [name.removeprefix(start) for name in self._bucket.sizes() if name.startswith(start)]
        self._bucket.download({f"{start}{name}": folder / name for name in names if _is_inside(name)})
        damage = find_damage(folder, step=step)
        return damage and damage.replace(f"{folder}/", f"{self.path}/{start}")


def _step_of(name: str) -> int | None:
    """Return the step of the checkpoint that a file belongs to; None: it belongs to none."""
    folder, _, rest = name.removeprefix("checkpoints/").partition("/")
    return int(folder) if name.startswith("checkpoints/") and rest and folder.isdecimal() else None


def _steps(names: Collection[str]) -> list[int]:
    """Return the steps of the complete checkpoints."""
    steps = {step for name in names if (step := _step_of(name)) is not None}
    return sorted(step for step in steps if f"checkpoints/{step}/{CHECKSUMS}" in names)


def _is_inside(name: str) -> bool:
    """Return whether an object's name, which anyone may have chosen, stays inside the folder that it is copied to."""
    return ".." not in PurePosixPath(name).parts and not name.startswith("/")


# Of a run


def find_copy(config: BaseRunConfig) -> Copy | None:
    """Return the run's copy in ``checkpoint.mirror``, which may not exist yet; None without a mirror.

    InputError: the mirror is not writable.
    """
    if config.mirror_url is not None:
        return _in_bucket(config.mirror_url)
    if config.checkpoint.mirror is None or config.mirror_folder is None:
        return None
    root, path = user_path(config.checkpoint.mirror), config.mirror_folder
    there, here = path.resolve(), config.folder.resolve()
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise InputError(f"checkpoint.mirror is {root}; expected a folder outside the run's own, {config.folder}")
    try:
        if jax.process_index() == 0:
            root.mkdir(exist_ok=True)  # not its parents: they are missing where a drive is not mounted
            path.parent.mkdir(parents=True, exist_ok=True)  # for a run named a/b
            tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise InputError(f"checkpoint.mirror is {root}: cannot write there ({error.strerror}); mount it") from None
    return FolderCopy(path)


def _in_bucket(url: str) -> BucketCopy:
    try:
        if jax.process_index() == 0:
            Bucket(url).check_writable()
    except OSError as error:
        remedy = "expected an existing bucket, and credentials that may write and remove objects in it"
        raise InputError(f"checkpoint.mirror: {url}: cannot write there ({error.strerror}); {remedy}") from None
    return BucketCopy(url)


class Mirror:
    """Keeps a copy of a run up to date; does nothing without one (None).

    The copy keeps the latest ``keep`` checkpoints, the best, and those of the run. Errors become warnings, at most one
    a minute, and the next update copies what is missing.
    """

    def __init__(self, run: RunFolder, target: Copy | None, keep: int, note: Callable[[str], None]):
        self._run, self._target, self._keep, self._note = run, target, keep, note
        self._last_warning = -math.inf

    def update(self, *, last: bool = False) -> None:
        """Copy what is missing or older there, the latest checkpoint first; the last update reports any failure."""
        if self._target is None:
            return
        try:
            self._target.update(self._run, self._keep)
        except (OSError, InputError) as error:
            if last or time.monotonic() - self._last_warning > WARN_INTERVAL:
                self._last_warning = time.monotonic()
                reason = error.strerror if isinstance(error, OSError) else error
                self._note(f"warning: {self._target.path}: the run cannot be copied there now ({reason})")
