"""The record of a run: its log, samples and picture, what a person sees of them, and other loggers."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from slm_jax.training import hardware
from slm_jax.training.config import BaseRunConfig
from slm_jax.training.loggers import Logger
from slm_jax.training.plots import draw_loss
from slm_jax.training.progress import ProgressLine
from slm_jax.training.run_folder import RunFolder
from slm_jax.training.step import StepMetrics
from slm_jax.training.task import EvaluationSums, Task

PLOT_INTERVAL = 30.0  # seconds between two drawings of loss.png


class RunRecord:
    """Writes down what happens in a run.

    Args:
        config: the run's.
        task: the run's.
        folder: the run's, whose log begins with what is in it.
        progress: what a person sees.
        n_devices: that share the work.

    Attributes:
        validation: the validation loss by step; infinite where it was not a number.
        sampled: the steps that have a sample.
    """

    def __init__(self, config: BaseRunConfig, task: Task, folder: RunFolder, progress: ProgressLine, n_devices: int):
        self.folder, self.progress = folder, progress
        self._config, self._task = config, task
        # The formula of the FLOPs is that of a whole language model's step.
        of_known_flops = task.unit == "token" and not task.params.frozen
        peak = hardware.peak_flops(task.model_config.dtype) if of_known_flops else None
        self._peak_flops = peak and peak * n_devices
        self._flops_per_token = hardware.flops_per_token(task.model_config) if peak else 0.0  # traces the model
        self._noticed_overfitting = False
        self._began = self._last_drawn = time.monotonic()

    def begin(self, step: int, loggers: Sequence[Logger]) -> None:
        """Drop what the folder has after a step (-1: all of it), and go on from there."""
        self.folder.cut_back(step)
        # Filtered once more: on another host the file may not have been cut yet.
        past = [row for row in self.folder.metrics() if row["step"] <= step]
        self.sampled = {sampled for sampled in self.folder.sampled_steps() if sampled <= step}
        self.validation = {row["step"]: _or_infinite(row["loss"]) for row in past if row["split"] == "val"}
        self._seconds_before = max((row.get("seconds", 0.0) for row in past), default=0.0)
        self._loggers = loggers

    def start_lap(self, step: int) -> None:
        """Note that from here on training goes on without a pause for evaluation or saving."""
        self._lap = Lap(step, time.monotonic())

    def seconds(self) -> float:
        """Return how long the run has taken, earlier starts included."""
        return self._seconds_before + time.monotonic() - self._began

    def train(self, step: int, metrics: StepMetrics) -> None:
        """Log and show the numbers of a step."""
        elapsed = time.monotonic() - self._lap.began
        steps = max(1, step - self._lap.step)
        rate = steps * self._task.tokens_per_step / max(elapsed, 1e-9)
        row = {
            "step": step,
            "split": "train",
            **self._loss(float(metrics.loss)),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": float(metrics.grad_norm),
            "tokens": step * self._task.tokens_per_step,
            "tokens_per_second": round(rate, 1),
            "mfu": rate * self._flops_per_token / self._peak_flops if self._peak_flops else None,
            "seconds": round(self.seconds(), 3),
            **({"skipped": True} if metrics.skipped else {}),
        }
        self._add(row)
        self.progress.train(row, elapsed / steps)
        self.start_lap(step)

    def evaluation(self, step: int, sums: EvaluationSums) -> bool:
        """Log and show an evaluation of the whole validation split; return whether its loss is the lowest so far."""
        loss = sums.loss
        row = {
            "step": step,
            "split": "val",
            **self._loss(loss),
            **(self._task.figures(sums) if self._task.figures else {}),
            f"{self._task.unit}s": int(sums.weight_sum),
            "seconds": round(self.seconds(), 3),
        }
        if self._task.bytes_per_token:  # comparable between tokenizers, which the loss a token is not
            row["bits_per_byte"] = loss / math.log(2) / self._task.bytes_per_token
        self._add(row)
        self.progress.validation(row)
        best = loss < min(self.validation.values(), default=math.inf)
        self.validation[step] = _or_infinite(loss)
        self._notice_overfitting()
        return best

    def test(self, step: int, figures: dict[str, Any]) -> None:
        """Log what was measured on the test split, once."""
        row = {"step": step, "split": "test", **figures}
        if row not in self.folder.metrics("test"):
            self._add(row)

    def sample(self, step: int, text: str) -> None:
        """Keep a sample."""
        self.sampled.add(step)
        self.folder.add_sample(step, text)
        for logger in self._loggers:
            logger.text("sample", text, step)

    def draw(self, at_least_every: float = 0.0) -> None:
        """Draw ``loss.png`` from the log, unless it was drawn less than so many seconds ago."""
        if time.monotonic() - self._last_drawn < at_least_every:
            return
        self._last_drawn = time.monotonic()
        if self.folder.writes:
            title, unit = f"{self._config.name}: loss by step", f"nats a {self._task.unit}"
            draw_loss(self.folder.metrics(), self.folder.path / "loss.png", title, unit)

    def _add(self, row: dict[str, Any]) -> None:
        self.folder.add_metrics(row)
        for logger in self._loggers:
            logger.metrics(row)

    def _loss(self, loss: float) -> dict[str, float]:
        return {"loss": loss, **({"perplexity": _perplexity(loss)} if self._task.unit == "token" else {})}

    def _notice_overfitting(self) -> None:
        """Say once when three evaluations in a row are clearly above the lowest while the training loss falls."""
        lowest = min(self.validation.values())
        recent = [self.validation[step] for step in sorted(self.validation)[-3:]]
        if self._noticed_overfitting or len(self.validation) < 4 or min(recent) < 1.01 * lowest:
            return
        best = min(self.validation, key=lambda step: self.validation[step])
        train = [row for row in self.folder.metrics("train") if row["loss"] is not None]
        before = [row["loss"] for row in train if row["step"] <= best][-10:]
        if not before or np.mean([row["loss"] for row in train[-10:]]) >= np.mean(before):
            return
        self._noticed_overfitting = True
        self.progress.note(
            f"overfitting: the validation loss was lowest at step {best:,} ({self.validation[best]:.4f}) while the "
            "training loss still falls; the checkpoint of the lowest is kept. More text, dropout or fewer steps help"
        )


@dataclasses.dataclass(frozen=True)
class Lap:
    """Since when, in steps and seconds, training has gone on without a pause for evaluation or saving."""

    step: int
    began: float


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss


def _or_infinite(loss: float | None) -> float:
    """Return a loss that compares: one that was not a number, null in the log, is worse than any other."""
    return loss if loss is not None and math.isfinite(loss) else math.inf
