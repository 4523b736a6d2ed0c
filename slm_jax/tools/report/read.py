"""What a run's folder holds, read as far as it can be: nothing but the folder itself has to be there and whole."""

import contextlib
import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from slm_jax.config import flatten, to_dict
from slm_jax.errors import InputError, MissingInputError
from slm_jax.runs import find_checkpoint
from slm_jax.tasks.config import FinetuneConfig, RunConfig
from slm_jax.training.checkpoint import best_step, read_metadata, saved_steps
from slm_jax.training.run_folder import BEFORE, RunFolder, find_run, split_step
from slm_jax.weights.files import find_file
from slm_jax.weights.hub import PINS

TASKS = ("pretraining", "classification", "instruction")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")

LARGEST = 1e300  # beyond it, sums and axes have no room in a float
LAST_STEP = 1 << 53  # the whole numbers up to it are floats, too

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a run.

    Attributes:
        folder: the run's.
        label: its name, unlike that of any other run of the report.
        step: of the checkpoint that was asked for; None: the best.
        task: what was trained.
        config: its configuration, by dotted key; empty where there is none that can be read.
        rows: the lines of its log.
        metadata: what is saved beside its best checkpoint, or another; empty without one.
        summary: the figures of the finished run; empty before.
    """

    folder: RunFolder
    label: str
    step: int | None
    task: str
    config: dict[str, Any]
    rows: list[Row]
    metadata: dict[str, Any]
    summary: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """The machine and the versions that it was trained with."""
        found = self.summary.get("environment") or self.metadata.get("environment")
        return found if isinstance(found, dict) else {}

    @property
    def unit(self) -> str:
        """What its loss is a mean over."""
        return "text" if self.task == "classification" else "token"

    @property
    def last_step(self) -> int:
        """How far its log goes."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def state(self) -> str:
        """Whether it is done, or how far it is."""
        if self.folder.is_locked():
            return "in training"
        if not self.rows:
            return "no log"
        if self.summary.get("step") == self.last_step:
            return "finished"
        return "not finished"

    @property
    def went_on(self) -> bool:
        """Whether it was trained beyond the end that its summary and last answers are of."""
        return number(self.summary.get("step")) < self.last_step

    def measured(self, moment: str, split: str) -> dict[str, Any]:
        """Return the figures of a split ``before`` or ``after`` training; empty where it was not measured."""
        if moment == "after" and self.went_on:
            return {}
        found = self.summary.get(moment)
        if moment == "before" and not found:
            found = self.folder.read_json(BEFORE)
        figures = found.get(split) if isinstance(found, dict) else None
        return figures if isinstance(figures, dict) else {}

    def points(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of a figure of the log; NaN where it was not finite."""
        rows = [row for row in self.rows if row["split"] == split and key in row]
        return np.array([row["step"] for row in rows], float), np.array([number(row[key]) for row in rows], float)

    def best(self) -> tuple[int, float] | None:
        """Return the step of the lowest validation loss, and that; None without any."""
        steps, losses = self.points("val", "loss")
        if not np.isfinite(losses).any():
            return None
        lowest = int(np.nanargmin(losses))
        return int(steps[lowest]), float(losses[lowest])


def number(value: object) -> float:
    """Return what is a number of at most 1e300 as one, and all else as NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return math.nan
    return float(value)


def listed(value: object) -> list[Any]:
    """Return what is a list, and for all else an empty one."""
    return value if isinstance(value, list) else []


def figure(value: object, form: str, missing: str = "not finite") -> str:
    """Return a figure as text; ``missing`` for what is no finite number."""
    found = number(value)
    return missing if math.isnan(found) else format(found, form)


def read_records(names: Sequence[str]) -> list[Record]:
    """Read runs; what is named twice is read once.

    Args:
        names: folders, or names of runs; ``runs/tiny@800`` names a checkpoint, too.

    Raises:
        MissingInputError: no run there, or no checkpoint of that step.
        InputError: what can be no path; a step that is none; a run that is named with two steps.
    """
    found: dict[Path, tuple[str, RunFolder, int | None]] = {}
    for name in names:
        folder, step = _find(name)
        first, _, first_step = found.setdefault(folder.path.resolve(), (name, folder, step))
        if step != first_step:
            raise InputError(
                f"{first} and {name}: are one run with different steps; expected each run once: choose one"
            )
    short = [path.name for path in found]
    return [
        _read(folder, path.name if short.count(path.name) == 1 else str(folder.path), step)
        for path, (_, folder, step) in found.items()
    ]


def _find(name: str) -> tuple[RunFolder, int | None]:
    path, step = split_step(name)
    try:
        folder = find_run(path)
    except MissingInputError as error:
        if not _are_weights(path):
            raise
        remedy = f"weights have no report, and slm-jax import --source {shlex.quote(str(path))} --run NAME makes a run"
        raise MissingInputError(f"{error}; {remedy} of them") from None
    if step is None:
        return folder, None
    checkpoint = find_checkpoint(folder.path, step)
    if checkpoint is None:
        raise MissingInputError(f"{folder.path}: no checkpoint in this run yet; leave @{step} out")
    return folder, checkpoint[1]


def _are_weights(path: Path) -> bool:
    """Return whether ``slm-jax import`` takes a path, or a name such as gpt2."""
    if path.is_dir():
        with contextlib.suppress(InputError):
            return find_file(path).is_file()
    return str(path) in PINS or (path.is_file() and path.suffix in WEIGHTS)


def _read(folder: RunFolder, label: str, step: int | None) -> Record:
    metadata = _metadata(folder, step)
    summary = folder.read_json("summary.json")
    summary = summary if isinstance(summary, dict) else {}
    config = _config(folder) or flatten(metadata.get("config", {}))
    task = config.get("task") or summary.get("task") or ("classification" if "classes" in metadata else "")
    rows = [row for row in _log(folder) if _is_step(row["step"]) and isinstance(row["split"], str)]
    task = task if task in TASKS else "pretraining"
    return Record(folder, label, step, task, config, rows, metadata, summary)


def _log(folder: RunFolder) -> list[Row]:
    with contextlib.suppress(OSError):
        return folder.metrics()
    return []


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LAST_STEP


def _config(folder: RunFolder) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        values = yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))
        return flatten(values) if isinstance(values, dict) else {}
    return {}


def steps_to_try(folder: RunFolder, step: int | None) -> list[int]:
    """Return the checkpoint that was asked for; or the best and then the others, the latest first."""
    if step is not None:
        return [step]
    steps = saved_steps(folder.checkpoints)[::-1]
    with contextlib.suppress(InputError):  # one of them cannot be read
        best = best_step(folder.checkpoints)
        steps.sort(key=lambda saved: saved != best)
    return steps


def _metadata(folder: RunFolder, step: int | None) -> dict[str, Any]:
    """Return what is saved beside the first checkpoint to try that can be read."""
    for candidate in steps_to_try(folder, step):
        with contextlib.suppress(InputError):
            return read_metadata(folder.checkpoints, candidate)
    return {}


def defaults(task: str) -> dict[str, Any]:
    """Return the configuration that a run of a task has where nobody says anything else, by dotted key."""
    config = RunConfig() if task == "pretraining" else FinetuneConfig(task=task)  # type: ignore[arg-type]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(to_dict(config)).items()}


def read_samples(folder: RunFolder) -> list[tuple[int, str]]:
    """Return the sampled texts, each with its step."""
    with contextlib.suppress(OSError):
        return folder.samples()
    return []


def read_responses(record: Record) -> list[tuple[Row, str | None, str | None]]:
    """Return the test instructions, each with the answer before training and after it; None where there is none."""
    before, after = (_answers(record.folder, name) for name in ("responses-before.json", "responses.json"))
    after = [] if record.went_on else after
    entries = after or before
    if len(before) != len(after):
        return [(entry, *((None, _answer(entry)) if after else (_answer(entry), None))) for entry in entries]
    return [(entry, _answer(was), _answer(entry)) for was, entry in zip(before, after, strict=True)]


def _answers(folder: RunFolder, name: str) -> list[Row]:
    return [entry for entry in listed(folder.read_json(name)) if isinstance(entry, dict)]


def _answer(entry: Row) -> str:
    return str(entry.get("model_response", ""))
