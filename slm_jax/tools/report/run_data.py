"""What a run's folder holds; only the folder itself must be there."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np

from slm_jax.errors import InputError, MissingInputError
from slm_jax.runs import RunFolder, best_step, find_checkpoint, find_run, saved_steps, split_step, try_metadata
from slm_jax.tasks.config import TASKS
from slm_jax.training.run_folder import Seconds

Row = dict[str, Any]
_BY_CLASS = ("classes", "confusion", "precision", "recall", "f1", "support")


Shares = list[float | None]


class Figures(TypedDict, total=False):
    """What a task measures of a split."""

    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    accuracy: float | None
    macro_f1: float | None
    exact_match: float | None
    rouge_l: float | None
    classes: list[str]
    confusion: list[list[int]]
    precision: Shares
    recall: Shares
    f1: Shares
    support: list[int]


class _Summary(TypedDict, total=False):
    task: str
    step: int
    seconds: Seconds | None
    environment: dict[str, Any]
    before: dict[str, Figures] | None
    after: dict[str, Figures]


class _Message(TypedDict):
    role: str
    content: str


class _Response(TypedDict, total=False):
    model_response: Required[str]
    instruction: str
    input: str | None
    messages: list[_Message]
    output: str


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run's folder holds; what cannot be read is empty."""

    folder: RunFolder
    label: str  # unique in the report
    step: int | None  # of the requested checkpoint; None: the best one
    config: dict[str, Any]  # by dotted key
    rows: list[Row]  # of the log
    metadata: dict[str, Any]  # of the best checkpoint, or another
    summary: dict[str, Any]  # of the finished run

    @property
    def task(self) -> str:
        task = str(self.config.get("task") or self.summary.get("task"))
        return task if task in TASKS else next(iter(TASKS))

    @property
    def environment(self) -> dict[str, Any]:
        return self.summary.get("environment") or self.metadata.get("environment") or {}

    @property
    def unit(self) -> str:
        """What the loss is a mean over."""
        return TASKS[self.task].unit

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def state(self) -> str:
        if self.folder.is_locked():
            return "in training"
        if not self.rows:
            return "no log"
        return "finished" if self.summary.get("step") == self.last_step else "not finished"

    @property
    def continued(self) -> bool:
        """Whether the run was trained beyond the step of its summary and its latest answers."""
        return self.summary.get("step", self.last_step) < self.last_step

    def measured(self, moment: str, split: str = "test") -> dict[str, Any]:
        """Return the figures of a split ``before`` or ``after`` training; empty if it was not measured."""
        if moment == "after" and self.continued:
            return {}
        found = self.summary.get(moment)
        if not found and moment == "before":
            found = self.folder.read_json("before.json", dict[str, Figures])
        figures = (found or {}).get(split) or {}
        sizes = {len(figures.get(name, ())) for name in _BY_CLASS} | {len(row) for row in figures.get("confusion", ())}
        return figures if len(sizes) == 1 else {}

    def points(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of a logged figure; NaN where it was not finite."""
        rows = [row for row in self.rows if row["split"] == split and key in row]
        return np.array([row["step"] for row in rows], float), np.array([row[key] for row in rows], float)

    def best(self) -> tuple[int, float] | None:
        """Return step and value of the lowest validation loss; None without any."""
        steps, losses = self.points("val", "loss")
        if not np.isfinite(losses).any():
            return None
        lowest = int(np.nanargmin(losses))
        return int(steps[lowest]), float(losses[lowest])

    def not_finite(self) -> int:
        """Return how many logged training steps had a loss or gradients that were not finite."""
        return sum(None in (row.get("loss"), row.get("grad_norm", 0)) for row in self.rows if row["split"] == "train")

    def responses(self) -> list[tuple[Row, str | None, str | None]]:
        """Return the test instructions, each with the answers before and after training; None if there is none."""
        before = self.folder.read_json("responses-before.json", list[_Response]) or []
        after = [] if self.continued else self.folder.read_json("responses.json", list[_Response]) or []
        texts: list[list[Any]] = [[entry["model_response"] for entry in each] for each in (before, after)]
        if len(before) != len(after):
            texts[1 if not after else 0] = [None] * len(after or before)
        return list(zip(after or before, *texts, strict=True))


def figure(value: float | None, form: str, missing: str = "not finite") -> str:
    return missing if value is None or not math.isfinite(value) else format(value, form)


def read_runs(names: Sequence[str]) -> list[RunData]:
    """Read runs by folder or name, each once; ``runs/tiny@800`` selects a checkpoint."""
    found: dict[Path, tuple[str, RunFolder, int | None]] = {}
    for name in names:
        path, named = split_step(name)
        folder, step = find_run(path), None
        if named is not None:
            checkpoint = find_checkpoint(folder.path, named)
            if checkpoint is None:
                raise MissingInputError(f"{folder.path}: no checkpoint in this run yet; leave @{named} out")
            step = checkpoint[1]
        first, _, first_step = found.setdefault(folder.path.resolve(), (name, folder, step))
        if step != first_step:
            raise InputError(f"{first} and {name}: one run with different steps; expected each run once")
    short = [path.name for path in found]
    runs = []
    for path, (_, folder, step) in found.items():
        label = path.name if short.count(path.name) == 1 else str(folder.path)
        metadata = try_metadata(folder, steps_to_try(folder, step))
        summary = folder.read_json("summary.json", _Summary) or {}
        runs.append(RunData(folder, label, step, folder.config(), folder.metrics(), metadata, summary))
    return runs


def steps_to_try(folder: RunFolder, step: int | None) -> list[int]:
    """Return the requested checkpoint; or the best one, followed by the others, the latest first."""
    if step is not None:
        return [step]
    steps = saved_steps(folder.checkpoints)[::-1]
    with contextlib.suppress(InputError):  # one of them cannot be read
        best = best_step(folder.checkpoints)
        steps.sort(key=lambda saved: saved != best)
    return steps
