"""What a run's folder holds, read as far as possible: only the folder itself must be there."""

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
from slm_jax.runs import RunFolder, best_step, find_checkpoint, find_run, saved_steps, split_step, try_metadata
from slm_jax.tasks.config import TASKS, FinetuneConfig, RunConfig
from slm_jax.training.run_folder import BEFORE
from slm_jax.weights.files import find_file
from slm_jax.weights.hub import PINS

LARGEST = 1e300  # sums and axes of larger numbers overflow

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a run.

    Attributes:
        folder: the run's folder.
        label: the run's name, unique in the report.
        step: step of the requested checkpoint; None: the best one.
        task: the task that was trained.
        config: the configuration by dotted key; empty if it cannot be read.
        rows: the lines of the log.
        metadata: what is stored beside the best checkpoint, or another; empty without a checkpoint.
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
        """The machine and the versions that the run was trained with."""
        return as_dict(self.summary.get("environment") or self.metadata.get("environment"))

    @property
    def unit(self) -> str:
        """What the loss is a mean over."""
        return TASKS[self.task].unit

    @property
    def last_step(self) -> int:
        """The last logged step."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def state(self) -> str:
        """Whether the run is finished, in training or neither."""
        if self.folder.is_locked():
            return "in training"
        if not self.rows:
            return "no log"
        return "finished" if self.summary.get("step") == self.last_step else "not finished"

    @property
    def continued(self) -> bool:
        """Whether the run was trained beyond the step of its summary and its latest answers."""
        return number(self.summary.get("step")) < self.last_step

    def measured(self, moment: str, split: str = "test") -> dict[str, Any]:
        """Return the figures of a split ``before`` or ``after`` training; empty if it was not measured."""
        if moment == "after" and self.continued:
            return {}
        found = self.summary.get(moment) or (self.folder.read_json(BEFORE) if moment == "before" else None)
        return as_dict(as_dict(found).get(split))

    def points(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of a logged figure; NaN where it was not finite."""
        rows = [row for row in self.rows if row["split"] == split and key in row]
        return np.array([row["step"] for row in rows], float), np.array([number(row[key]) for row in rows], float)

    def best(self) -> tuple[int, float] | None:
        """Return step and value of the lowest validation loss; None without any."""
        steps, losses = self.points("val", "loss")
        if not np.isfinite(losses).any():
            return None
        lowest = int(np.nanargmin(losses))
        return int(steps[lowest]), float(losses[lowest])

    def not_finite(self) -> int:
        """Return how many logged training steps had a loss or gradients that were not finite."""
        rows = [row for row in self.rows if row["split"] == "train"]
        return sum(any(key in row and math.isnan(number(row[key])) for key in ("loss", "grad_norm")) for row in rows)

    def samples(self) -> list[tuple[int, str]]:
        """Return the sampled texts, each with its step."""
        with contextlib.suppress(OSError):
            return self.folder.samples()
        return []

    def responses(self) -> list[tuple[Row, str | None, str | None]]:
        """Return the test instructions, each with the answers before and after training; None if there is none."""
        before = self._answers("responses-before.json")
        after = [] if self.continued else self._answers("responses.json")
        texts: list[list[Any]] = [[str(entry.get("model_response", "")) for entry in each] for each in (before, after)]
        if len(before) != len(after):
            texts[1 if not after else 0] = [None] * len(after or before)
        return list(zip(after or before, *texts, strict=True))

    def _answers(self, name: str) -> list[Row]:
        entries = self.folder.read_json(name)
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def as_dict(value: object) -> dict[str, Any]:
    """Return a dictionary as it is, and everything else as an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: object) -> float:
    """Return a number of at most 1e300 as a float, and everything else as NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return math.nan
    return float(value)


def figure(value: object, form: str, missing: str = "not finite") -> str:
    """Return a figure as text; ``missing`` if it is not a finite number."""
    found = number(value)
    return missing if math.isnan(found) else format(found, form)


def read_records(names: Sequence[str]) -> list[Record]:
    """Read runs by folder or name, each once; ``runs/tiny@800`` selects a checkpoint.

    Raises:
        MissingInputError: no run there, or no checkpoint of that step.
        InputError: an invalid path or step; a run that is named with two steps.
    """
    found: dict[Path, tuple[str, RunFolder, int | None]] = {}
    for name in names:
        folder, step = _find(name)
        first, _, first_step = found.setdefault(folder.path.resolve(), (name, folder, step))
        if step != first_step:
            raise InputError(f"{first} and {name}: one run with different steps; expected each run once")
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
        command = f"slm-jax import --source {shlex.quote(str(path))} --run NAME"
        raise MissingInputError(f"{error}; these are weights: {command} makes a run of them") from None
    if step is None:
        return folder, None
    checkpoint = find_checkpoint(folder.path, step)
    if checkpoint is None:
        raise MissingInputError(f"{folder.path}: no checkpoint in this run yet; leave @{step} out")
    return folder, checkpoint[1]


def _are_weights(path: Path) -> bool:
    """Return whether ``slm-jax import`` reads a path, or a name such as gpt2."""
    if path.is_dir():
        with contextlib.suppress(InputError):
            return find_file(path).is_file()
    return str(path) in PINS or (path.is_file() and path.suffix in (".safetensors", ".bin", ".pt", ".pth"))


def _read(folder: RunFolder, label: str, step: int | None) -> Record:
    metadata = try_metadata(folder, steps_to_try(folder, step))
    summary = as_dict(folder.read_json("summary.json"))
    config: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        config = flatten(as_dict(yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))))
    config = config or flatten(metadata.get("config", {}))
    rows: list[Row] = []
    with contextlib.suppress(OSError):
        rows = [row for row in folder.metrics() if isinstance(row["step"], int) and isinstance(row["split"], str)]
    task = config.get("task") or summary.get("task")
    return Record(folder, label, step, task if task in TASKS else next(iter(TASKS)), config, rows, metadata, summary)


def steps_to_try(folder: RunFolder, step: int | None) -> list[int]:
    """Return the requested checkpoint; or the best one, followed by the others, the latest first."""
    if step is not None:
        return [step]
    steps = saved_steps(folder.checkpoints)[::-1]
    with contextlib.suppress(InputError):  # one of them cannot be read
        best = best_step(folder.checkpoints)
        steps.sort(key=lambda saved: saved != best)
    return steps


def defaults(task: str) -> dict[str, Any]:
    """Return the default configuration of a task, by dotted key."""
    config = RunConfig() if TASKS[task].command == "train" else FinetuneConfig(task=task)  # type: ignore[arg-type]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(to_dict(config)).items()}
