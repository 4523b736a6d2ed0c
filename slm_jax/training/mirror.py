"""A run's second home: a folder such as a mounted drive's, to which checkpoints are copied while training goes on.

The mirror has the layout of a run's folder. Whatever happens to it, training goes on.
"""

import errno
import filecmp
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from slm_jax.errors import InputError
from slm_jax.files import user_path
from slm_jax.training.checkpoint import CHECKSUMS, METADATA, best_step, find_damage, saved_steps
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.progress import format_duration
from slm_jax.training.run_folder import RunFolder

PINNED = ".mirrored"  # the folder of the run where the checkpoint that is being copied stays until it is
RETRY_INTERVAL = 15.0  # seconds from one attempt to the next while nothing can be copied
SAY_INTERVAL = 60.0  # seconds from one line about that to the next
QUIET_CLOSE = 3.0  # seconds that the end of a run waits for every checkpoint, before only two of them are copied
CLOSE_TIMEOUT = 300.0  # seconds that the end of a run waits for the last copies


def find_mirror(config: BaseRunConfig) -> RunFolder | None:
    """Return the run's folder in ``checkpoint.mirror``, whether or not it is there yet; None without a mirror.

    Raises:
        InputError: a mirror that cannot be written to, or that lies in the run's own folder or around it.
    """
    if config.checkpoint.mirror is None or config.mirror_folder is None:
        return None
    root, mirror = user_path(config.checkpoint.mirror), RunFolder(config.mirror_folder)
    there, here = mirror.path.resolve(), config.folder.resolve()
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise InputError(
            f"checkpoint.mirror is {root}, where this run's own folder {config.folder} lies; choose a folder apart "
            "from it"
        )
    if mirror.writes:
        try:
            # Not its parents: they are missing where a drive is not mounted.
            root.mkdir(exist_ok=True)
            mirror.path.parent.mkdir(parents=True, exist_ok=True)  # of a run called a/b
            probe = root / f".write-test-{os.getpid()}"
            probe.write_text("x")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"checkpoint.mirror is {root}: cannot write there ({error.strerror}); mount it, or choose another "
                "folder"
            ) from None
    return mirror


class Mirror:
    """Copies a run to its mirror in a thread of its own, checkpoint by checkpoint as they are saved.

    Use as a context manager, around the writing of everything that is to be copied; leaving it waits for the last
    copies, but not for ever. Trouble with the mirror is said, at most once a minute, and never raised.
    """

    def __init__(self, run: RunFolder, target: RunFolder, keep: int, note: Callable[[str], None]):
        """Take the run's folder and that of :func:`find_mirror`, of which ``keep`` checkpoints stay there at least.

        ``note`` says a line to a person.
        """
        self._run, self._target, self._keep, self._note = run, target, keep, note
        self._pinned = run.path / PINNED
        self._wake = threading.Event()
        self._closing = self._in_a_hurry = False
        self._attempt_began: float | None = None
        self._failing_since: str | None = None
        self._reason, self._is_full = "", False
        self._was_said = False
        self._last_said = -math.inf
        self._latest: int | None = None
        self._damaged: set[int] = set()
        self._verified: set[int] = set()
        self._copied: dict[str, tuple[int, int]] = {}
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join(QUIET_CLOSE)
        if self._thread.is_alive():
            self._in_a_hurry = True
            self._note(f"copying the last to {self._target.path}: at most {format_duration(CLOSE_TIMEOUT)}")
            self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            self._note(f"warning: {self._target.path}: too slow, not waited for any longer; {self._what_is_there()}")
        elif self._failing_since:
            remedy = "free space there" if self._is_full else "mend that"
            self._note(
                f"warning: {self._target.path}: {self._what_is_there()} ({self._reason}); {remedy}, then start the "
                "same command again, to copy what is missing"
            )

    def checkpoint_saved(self, step: int) -> None:
        """Have the checkpoint of a step copied, which has its checksums; returns at once."""
        self._wake.set()
        began = self._attempt_began
        if began is not None and time.monotonic() - began > SAY_INTERVAL:
            seconds = time.monotonic() - began
            self._say(f"is slow: a copy has taken {seconds:.0f} s so far")

    def _work(self) -> None:
        while True:
            self._wake.clear()
            closing = self._closing  # before the attempt, which then copies all that there will be
            self._attempt(closing)
            if closing:
                return
            self._wake.wait(RETRY_INTERVAL if self._failing_since else None)

    def _attempt(self, closing: bool) -> None:
        self._attempt_began = time.monotonic()
        try:
            self._synchronise(closing)
        except Exception as error:  # of any kind: the mirror's trouble is not training's
            self._reason = _reason(error)
            self._is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._failing_since = self._failing_since or time.strftime("%H:%M:%S")
            self._was_said |= self._say(f"nothing can be copied there since {self._failing_since} ({self._reason})")
        else:
            self._failing_since = None
            if self._was_said:
                self._was_said = False
                self._note(f"{self._target.path} is back; {self._what_is_there()}")
        finally:
            self._attempt_began = None
            shutil.rmtree(self._pinned, ignore_errors=True)

    def _say(self, what: str) -> bool:
        """Say a line, unless another one was said a short while ago; return whether it was."""
        if time.monotonic() - self._last_said < SAY_INTERVAL:
            return False
        self._last_said = time.monotonic()
        self._note(f"warning: {self._target.path}: {what}; training goes on; {self._what_is_there()}")
        return True

    def _what_is_there(self) -> str:
        return "no checkpoint is there" if self._latest is None else f"the latest there is of step {self._latest:,}"

    def _synchronise(self, closing: bool) -> None:
        """Copy what is missing there: the latest checkpoint; when it is whole, make room for the best and the others.

        They wait where there is something newer, and do not come at all when the end of the run waits for them.
        """
        if not (self._run.path / "config.yaml").is_file():  # what makes a folder count as a run
            return
        # Its parents are not made again: a drive that comes back is mounted on an empty folder, or none.
        self._target.path.mkdir(exist_ok=True)
        self._copy_other_files()
        self._target.checkpoints.mkdir(exist_ok=True)
        here = [step for step in saved_steps(self._run.checkpoints) if self._is_whole(step)]
        latest = next((step for step in reversed(here) if self._copy(step)), None)
        is_lost = bool(here) and here[-1] not in {latest, *self._damaged}
        if is_lost and saved_steps(self._run.checkpoints)[-1:] <= here[-1:]:  # else a newer one is told of in a moment
            self._say(f"step {here[-1]:,} is not copied, as it was removed from {self._run.path} just now")
        if latest is None:
            return
        self._latest = latest
        best = None
        with suppress(InputError):  # a checkpoint that cannot be read: which is the best is not known
            best = best_step(self._run.checkpoints)
        with suppress(InputError):
            self._remove_old(here)
        for step in sorted(here, key=lambda step: (step != best, -step)):
            ends = self._closing and not closing
            if ends or (step != best and (self._in_a_hurry or self._wake.is_set())):
                return
            self._copy(step)

    def _is_whole(self, step: int) -> bool:
        return step not in self._damaged and (self._run.checkpoints / str(step) / CHECKSUMS).is_file()

    def _copy_other_files(self) -> None:
        for name in other_files(self._run.path):
            source, target = self._run.path / name, self._target.path / name
            with suppress(FileNotFoundError):  # replaced at this moment: the next time
                version = _version(source)
                if self._copied.get(name) != version or not target.is_file() or target.stat().st_size != version[1]:
                    if not _same_content(source, target):
                        copy_file(source, target)
                    self._copied[name] = version

    def _copy(self, step: int) -> bool:
        """Copy a checkpoint unless it is there already; return whether it is there now."""
        source, target = self._run.checkpoints / str(step), self._target.checkpoints / str(step)
        try:
            if self._is_there(step, source, target):
                return True
            _pin(source, self._pinned)
        except OSError:
            if (source / METADATA).is_file():
                raise
            return False  # no longer kept
        try:
            copy_checkpoint(self._pinned, target)
        except InputError:
            damage = find_damage(self._pinned) and find_damage(source)
            if damage is None:  # spoiled on the way
                raise
            if (source / METADATA).is_file():  # else it was being removed when it was pinned
                self._damaged.add(step)
                self._note(f"warning: {damage}; it is not copied to {self._target.path}")
            return False
        self._verified.add(step)
        return True

    def _is_there(self, step: int, source: Path, target: Path) -> bool:
        """Return whether the mirror has a checkpoint; each is read once, and later its sizes are looked at."""
        if not _same_content(source / CHECKSUMS, target / CHECKSUMS):
            return False
        if step in self._verified:
            return _sizes(source) == _sizes(target)
        if find_damage(target):
            return False
        self._verified.add(step)
        return True

    def _remove_old(self, here: list[int]) -> None:
        """Remove what is kept neither here nor, as a run on a fresh machine has little, by the same rule there."""
        checkpoints = self._target.checkpoints
        there = saved_steps(checkpoints)
        kept = {*here, *there[-self._keep :], best_step(checkpoints)}
        for path in list(checkpoints.iterdir()):
            if path.name.endswith(".partial") or (path.name.isdecimal() and int(path.name) not in kept):
                shutil.rmtree(path, ignore_errors=True)


def other_files(run: Path) -> list[str]:
    """Return the names of a run's files but those of checkpoints and logs for other programs; the configuration first.

    It is what makes a folder count as a run.
    """
    files = [path for path in [*run.iterdir(), *(run / "tokenizer").rglob("*")] if path.is_file()]
    finished = [path for path in files if not path.name.startswith(".") and not path.name.endswith(".partial")]
    return sorted((str(path.relative_to(run)) for path in finished), key=lambda name: (name != "config.yaml", name))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in one step: who reads the target sees the old one or the new one.

    Raises:
        OSError: it cannot be read or written.
        InputError: the copy is damaged.
    """
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    version = _version(source)
    shutil.copyfile(source, partial)
    if not _same_content(source, partial) and _version(source) == version:  # else it was written to meanwhile
        raise InputError(f"{partial}: is damaged: it differs from {source}, which it was copied from; copy it again")
    partial.replace(target)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint's folder, which gets its name when the copy is whole; it replaces one that is there.

    Raises:
        OSError: it cannot be read or written.
        InputError: the copy is damaged.
    """
    partial, replaced = (target.with_name(f"{target.name}.{what}") for what in ("partial", "replaced.partial"))
    for path in (partial, replaced):
        shutil.rmtree(path, ignore_errors=True)
    try:
        partial.mkdir()
        for file in sorted(source.rglob("*")):  # without their permissions and times, which not every drive can store
            copy = partial / file.relative_to(source)
            copy.mkdir() if file.is_dir() else shutil.copyfile(file, copy)
        if damage := find_damage(partial):
            raise InputError(damage)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _pin(source: Path, target: Path) -> None:
    """Link a checkpoint's files, which then stay when it is removed; copy them where there are no links."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in sorted(source.rglob("*")):
        pinned = target / file.relative_to(source)
        if file.is_dir():
            pinned.mkdir()
            continue
        try:
            os.link(file, pinned)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(file, pinned)


def _version(file: Path) -> tuple[int, int]:
    return file.stat().st_mtime_ns, file.stat().st_size


def _same_content(one: Path, other: Path) -> bool:
    filecmp.clear_cache()  # what changed and kept size and time is what is looked for
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _sizes(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or repr(error)
    file = error.filename2 or error.filename  # of two the one that was written
    return f"{file}: {error.strerror}" if file else error.strerror
