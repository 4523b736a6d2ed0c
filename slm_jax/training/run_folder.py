"""A run's folder: its layout, its lock and its log, which a resume cuts back to the step of the checkpoint."""

import contextlib
import hashlib
import json
import math
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Container, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Required, TypedDict

import jax
from msgspec import Meta

from slm_jax.config import flatten, parse_yaml
from slm_jax.errors import InputError
from slm_jax.files import Object, parse_json, read_json, replace_text, sha256, unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


Seconds = Annotated[float, Meta(ge=0, le=1e12)]
BEFORE = "before.json"  # what the task measured before the first step
FROZEN = "frozen.safetensors"  # the parameters that a run does not train


class LogRow(TypedDict, total=False):
    """A line of the log; each task adds keys of its own."""

    step: Required[Annotated[int, Meta(ge=0, lt=2**53)]]
    split: Required[str]
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    accuracy: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens: int
    tokens_per_second: float | None
    seconds: Seconds | None
    mfu: float | None


class RunFolder:
    """The folder of a run; hosts other than the first write nothing.

    ``metrics.jsonl``: one JSON object a line (step, split, loss, perplexity, …). ``samples.md``: sampled text by step.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.samples_file = path / "samples.md"
        self.checkpoints = path / "checkpoints"
        self._lock: IO[str] | None = None
        self._owner = uuid.uuid4().hex  # in the lock file, while this process trains

    @property
    def writes(self) -> bool:
        """Whether this host writes; initializes JAX."""
        return jax.process_index() == 0

    def step_path(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.checkpoints / str(step)

    def create(self) -> None:
        """Create the folder; refuse one that cannot be written to, or cannot hold checkpoints."""
        place = self.path.resolve().as_posix()
        try:
            place.encode()
        except UnicodeEncodeError:
            raise InputError(f"{place}: the path is not UTF-8, which TensorStore needs; rename the folder") from None
        if "\\" in place:
            raise InputError(f"{place}: the path has a backslash, which TensorStore replaces; rename the folder")
        try:
            if self.writes:
                self.path.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise InputError(f"{self.path}: cannot write there ({error.strerror}); use another --runs_dir") from None

    def check_links(self) -> None:
        """Refuse links, pipes and devices in the folder, through which the run would write elsewhere."""
        for folder in (self.path, self.checkpoints, self.path / "tokenizer"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise InputError(f"{path} is a link, pipe or device; expected a regular file or folder: remove it")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in the folder, and remove the partial files of a killed one."""
        if not self.writes:
            yield
            return
        self._lock = self._take_lock()
        try:
            for path in (*self.path.glob("*.partial"), *self.path.glob("tokenizer/*.partial")):
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
            yield
        finally:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> IO[str]:
        file = (self.path / ".lock").open("a", encoding="utf-8")
        if not _try_lock(file):
            time.sleep(0.2)  # longer than is_locked of another process holds it
            if not _try_lock(file):
                file.close()
                raise InputError(f"{self.path} is being trained by another process; use another --run NAME")
        file.truncate(0)
        file.write(self._owner)
        file.flush()
        return file

    def check_lock(self) -> None:
        """Stop if another process has taken the lock, which can happen if it was deleted or the disk has no locks."""
        if self._lock is None:
            return
        try:
            owner = (self.path / ".lock").read_text(encoding="utf-8")
        except FileNotFoundError:
            if not (self.path / "config.yaml").is_file():
                raise InputError(f"{self.path}: was removed while it was being trained") from None
            self._lock.close()
            self._lock = self._take_lock()
            return
        if owner != self._owner:
            raise InputError(f"{self.path}: another process is now training this run; stopped")

    def is_locked(self) -> bool:
        """Return whether a process is training in the folder; writes nothing."""
        try:
            with (self.path / ".lock").open() as file:
                return not _try_lock(file, shared=True)
        except OSError:  # no lock file
            return False

    def set_aside_all_but(self, steps: Container[int]) -> None:
        """Rename checkpoint folders of other steps than these, so that training can save those steps again."""
        if not self.writes or not self.checkpoints.is_dir():
            return
        for path in list(self.checkpoints.iterdir()):
            if path.name.isdecimal() and int(path.name) not in steps:
                path.replace(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))

    def write_text(self, name: str, text: str) -> None:
        """Replace a file of the folder atomically."""
        if self.writes:
            with self._writing(self.path / name):
                replace_text(self.path / name, text)

    def read_json(self, name: str, kind: Any = Object) -> Any:
        """Return the content of a JSON file of the folder; None if it cannot be read or is not of type ``kind``."""
        try:
            return read_json(self.path / name, kind=kind)
        except InputError:
            return None

    def config(self) -> dict[str, Any]:
        """Return the run's saved configuration by dotted key; empty if it cannot be read."""
        try:
            content = parse_yaml((self.path / "config.yaml").read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            return {}
        return flatten(content) if isinstance(content, dict) else {}

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append a line; NaN and infinities, which JSON lacks, become null."""
        if self.writes:
            self.check_lock()
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._append(self.metrics_file, json.dumps(finite) + "\n")

    def add_sample(self, step: int, text: str) -> None:
        """Append a sample, indented so that none of its lines looks like a heading."""
        if self.writes:
            body = "\n".join(f"    {line}" for line in text.splitlines())
            self._append(self.samples_file, f"## Step {step}\n\n{body}\n\n")

    def _append(self, file: Path, text: str) -> None:
        with self._writing(file), file.open("a", encoding="utf-8") as opened:
            opened.write(text)

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(path, error) from None

    def metrics(self, split: str | None = None) -> list[dict[str, Any]]:
        """Return the lines of one split (None: all splits) without damaged ones."""
        rows: list[dict[str, Any]] = []
        for line in _read(self.metrics_file).splitlines():
            with contextlib.suppress(InputError):
                rows.append(parse_json(line, self.metrics_file, kind=LogRow))
        return [row for row in rows if split in (None, row["split"])]

    def samples(self) -> list[tuple[int, str]]:
        """Return the samples, each with its step."""
        return [
            (step, "\n".join(line.removeprefix("    ") for line in section.strip("\n").split("\n")[2:]))
            for step, section in self._sections()
            if step is not None
        ]

    def seal(self) -> Object:
        """Return the current size in bytes and SHA-256 of each log file, for :meth:`changes`."""
        return {file.name: (file.stat().st_size, sha256(file)) for file in self._logs() if file.is_file()}

    def changes(self, seal: Object) -> list[Path]:
        """Return the log files whose content up to the sealed size has changed."""
        changed = []
        for file in self._logs():
            size, digest = seal.get(file.name, (0, hashlib.sha256().hexdigest()))
            content = file.read_bytes()[:size] if file.is_file() else b""
            if hashlib.sha256(content).hexdigest() != digest:
                changed.append(file)
        return changed

    def _logs(self) -> tuple[Path, ...]:
        return self.metrics_file, self.samples_file, self.path / BEFORE

    def cut_back(self, step: int) -> None:
        """Drop what was logged after a step, so that the log of a resumed run looks like that of an unbroken one."""
        if not self.writes:
            return
        kept = [row for row in self.metrics() if row["step"] <= step]
        self.write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        if self.samples_file.is_file():
            sections = self._sections() if step >= 0 else []
            self.write_text("samples.md", "".join(section for at, section in sections if at is None or at <= step))

    def _sections(self) -> list[tuple[int | None, str]]:
        """Return the sections of samples.md with their steps. Only headings are not indented.

        Text before the first heading, such as after a damaged heading, has no step.
        """
        parts = re.split(r"^(?=## Step \d{1,15}$)", _read(self.samples_file), flags=re.MULTILINE)
        return [(int(match[1]) if (match := re.match(r"## Step (\d+)\n", part)) else None, part) for part in parts]


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _try_lock(file: IO[str], shared: bool = False) -> bool:
    """Lock a file until it is closed; return False if another process holds the lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, such as some mounted drives
        pass
    return True
