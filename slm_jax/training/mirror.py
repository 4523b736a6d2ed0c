"""The copy of a run in object storage, for ``checkpoint.mirror``: the files of the run's folder under the same names.

An object cannot be renamed and a folder does not exist, so a checkpoint counts once its ``sha256.json`` is there, which
is written last and removed first.
"""

import shutil
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from slm_jax.errors import InputError
from slm_jax.files import Bucket
from slm_jax.training.checkpoint import CHECKSUMS, METADATA, find_damage, lowest, parse_metadata, saved_steps
from slm_jax.training.run_folder import FROZEN, RunFolder


class BucketRun:
    """A run in object storage, such as ``gs://bucket/runs/tiny``, which is ``path``; any failure is an OSError.

    An InputError says that the bucket holds something else, or that a package is missing.
    """

    def __init__(self, url: str):
        self.path = url
        self._bucket = Bucket(url)
        self._uploaded: dict[str, tuple[int, int]] = {}  # size and time of the files as they were when copied

    def names(self) -> set[str]:
        """Return the names of files and folders in the run's folder."""
        return {name.partition("/")[0] for name in self._bucket.sizes()}

    def steps(self) -> list[int]:
        """Return the steps of the whole checkpoints, ascending."""
        return _steps(self._bucket.sizes())

    def metadata(self, step: int) -> dict[str, Any]:
        """Return what :func:`slm_jax.training.checkpoint.read_metadata` returns."""
        name = f"checkpoints/{step}/{METADATA}"
        return parse_metadata(self._bucket.read(name), f"{self.path}/{name}")

    def best_step(self) -> int | None:
        """Return the step with the lowest validation loss; damaged metadata do not count."""
        losses = {}
        for step in self.steps():
            with suppress(InputError):
                losses[step] = self.metadata(step)["validation_loss"]
        return lowest(losses)

    def check_writable(self) -> None:
        """Raise an OSError unless objects can be written and removed there."""
        self._bucket.check_writable()

    # From the run's folder to the bucket

    def update(self, run: RunFolder, keep: int) -> None:
        """Copy what is missing or older there, the latest checkpoint first; remove checkpoints that are not kept.

        The latest ``keep`` stay, beside the best and those of the run.
        """
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
        """Copy the changed files of a run apart from checkpoints and folders of logs, the configuration first."""
        there, changed, seen = self._bucket.sizes(), {}, {}
        for path in sorted([*run.path.iterdir(), *(run.path / "tokenizer").rglob("*")]):
            if not path.is_file() or path.name.startswith(".") or path.suffix == ".partial":
                continue
            name, about = path.relative_to(run.path).as_posix(), path.stat()
            seen[name] = about.st_size, about.st_mtime_ns
            if name in self._uploaded:
                is_changed = self._uploaded[name] != seen[name]
            else:
                is_changed = there.get(name) != about.st_size or self._bucket.is_older(name, about.st_mtime)
            if is_changed:
                changed[name] = path
        with tempfile.TemporaryDirectory() as folder:  # of copies that don't grow while they are sent, as the log does
            for i, name in enumerate(changed):
                if name != FROZEN:
                    changed[name] = Path(shutil.copyfile(changed[name], Path(folder) / str(i)))
            if "config.yaml" in changed:  # which makes it count as a run
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

    # From the bucket to the run's folder

    def fetch(self, run: RunFolder, step: int) -> str | None:
        """Copy a checkpoint, the best one and the files; or return what is damaged, and copy nothing.

        The checkpoint gets its name last, which makes the copy count, and only if its SHA-256 are the recorded ones.
        """
        copy, best_copy = run.path / ".mirror.partial", run.path / ".best.partial"  # hidden: they are no run yet
        try:
            if damage := self._download_checkpoint(step, copy):
                return damage
            run.set_aside_after(step - 1)  # damaged ones
            self._download_files(run)
            run.checkpoints.mkdir(exist_ok=True)
            best = self.best_step()
            if best is not None and best < step and not self._download_checkpoint(best, best_copy):
                shutil.rmtree(run.step_path(best), ignore_errors=True)
                best_copy.rename(run.step_path(best))
            copy.rename(run.step_path(step))
            return None
        finally:
            for folder in (copy, best_copy):
                shutil.rmtree(folder, ignore_errors=True)

    def _download_files(self, run: RunFolder) -> None:
        """Copy all files of a run apart from its checkpoints, the configuration first."""
        names = [name for name in self._bucket.sizes() if "/" not in name or name.startswith("tokenizer/")]
        names = [name for name in names if _is_inside(name) and not name.startswith(".")]
        copies = {name: run.path / f"{name}.partial" for name in names}
        self._bucket.download(copies)
        for name in sorted(names, key=lambda name: (name != "config.yaml", name)):  # which makes it count as a run
            copies[name].replace(run.path / name)

    def _download_checkpoint(self, step: int, copy: Path) -> str | None:
        """Copy a checkpoint to a new folder; return what is damaged."""
        shutil.rmtree(copy, ignore_errors=True)
        start = f"checkpoints/{step}/"
        names = [name.removeprefix(start) for name in self._bucket.sizes() if name.startswith(start)]
        self._bucket.download({f"{start}{name}": copy / name for name in names if _is_inside(name)})
        if not (copy / CHECKSUMS).is_file():  # removed a moment ago
            return f"{self.path}/{start}{CHECKSUMS} is missing from the checkpoint"
        damage = find_damage(copy)
        return damage and damage.replace(f"{copy}/", f"{self.path}/{start}")


def _step_of(name: str) -> int | None:
    """Return the step of the checkpoint that a file belongs to; None: to none."""
    folder, _, rest = name.removeprefix("checkpoints/").partition("/")
    return int(folder) if name.startswith("checkpoints/") and rest and folder.isdecimal() else None


def _steps(names: Collection[str]) -> list[int]:
    """Return the steps of the checkpoints that are whole."""
    steps = {step for name in names if (step := _step_of(name)) is not None}
    return sorted(step for step in steps if f"checkpoints/{step}/{CHECKSUMS}" in names)


def _is_inside(name: str) -> bool:
    """Return whether a name, which others may have written, stays inside the folder that it is copied to."""
    return ".." not in PurePosixPath(name).parts and not name.startswith("/")
