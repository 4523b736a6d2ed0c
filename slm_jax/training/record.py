"""The record of a run: log, samples, loss curve, profile and summary, in its folder, on the screen and in loggers."""

import math
import shlex
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from slm_jax.errors import InputError
from slm_jax.pictures import own_style, write_png
from slm_jax.training import hardware
from slm_jax.training.loggers import Logger
from slm_jax.training.progress import ProgressLine, format_duration
from slm_jax.training.run_folder import FROZEN, RunFolder
from slm_jax.training.step import StepMetrics
from slm_jax.training.task import EvaluationSums, Task

if TYPE_CHECKING:  # imported only when loss curves are drawn
    from matplotlib.axes import Axes

PLOT_INTERVAL = 30.0  # seconds between two drawings of loss.png
SPIKE = 1.5  # a loss above this multiple of the highest recent one is reported
MAX_SKIPPED = 3  # consecutive steps without finite gradients after which training stops
TRAINING, VALIDATION, SCORE = "#9ab8d9", "#c2410c", "#4d7c0f"
RUN_FILES = {
    "config.yaml": "the run's configuration, every key",
    "metrics.jsonl": "losses, learning rate, gradient norm and speed, one JSON object a line",
    "loss.png": "the loss curves",
    "samples.md": "text sampled during training",
    "tensorboard": "the log for TensorBoard",
    "wandb": "the log for Weights & Biases",
    "profile": "the profile of a few steps",
    "summary.json": "the figures of the whole run",
    "tokenizer": "the tokenizer",
    FROZEN: "the parameters that were not trained",
    "checkpoints": "the latest checkpoints and the best",
}


class TrainingDiverged(RuntimeError):
    """Loss or gradients were not finite for several steps in a row."""


class RunLog:
    """Logs a run. A resumed run's log is first cut back to ``last_kept``, the step that it resumes from (-1: new run).

    ``validation`` has the validation loss by step, infinity for NaN; ``sampled`` has the steps with a sample.
    """

    def __init__(
        self,
        task: Task,
        folder: RunFolder,
        progress: ProgressLine,
        n_devices: int,
        last_kept: int = -1,
        loggers: Sequence[Logger] = (),
    ):
        self.folder, self.progress, self._task, self._loggers = folder, progress, task, loggers
        # The FLOPs formula holds only if a whole language model is trained.
        whole = task.unit == "token" and not task.params.frozen
        peak = hardware.peak_flops(task.model_config.dtype) if whole else None
        self._peak_flops = peak and peak * n_devices
        self._flops_per_token = hardware.flops_per_token(task.model_config) if peak else 0.0  # traces the model
        self._warned_of_overfitting = False
        self._began = self._last_drawn = self._lap_began = time.monotonic()
        self._lap_step = max(0, last_kept)
        self._pending: tuple[int, StepMetrics] | None = None
        self._skipped_in_a_row = 0
        self._recent: deque[float] = deque(maxlen=20)  # the last logged losses
        folder.cut_back(last_kept)
        # Filtered here, too: another host may not see the cut yet.
        past = [row for row in folder.metrics() if row["step"] <= last_kept]
        self._seconds_before = max((row.get("seconds") or 0.0 for row in past), default=0.0)
        self.validation = {row["step"]: _or_infinite(row.get("loss")) for row in past if row["split"] == "val"}
        self.sampled = {step for step, _ in folder.samples() if step <= last_kept}

    def start_lap(self, step: int) -> None:
        """Restart the speed measurement after a pause for evaluation or saving."""
        self._lap_step, self._lap_began = step, time.monotonic()

    def seconds(self) -> float:
        """Return how long the run has taken, earlier starts included."""
        return self._seconds_before + time.monotonic() - self._began

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Take the metrics of the step just dispatched, and log those of the previous one, which is done."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Wait for the latest step and log it if it is due; raise TrainingDiverged after several bad ones in a row."""
        if self._pending is None:
            return
        step, metrics = self._pending[0], jax.device_get(self._pending[1])
        self._pending = None
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics.skipped else 0
        if metrics.skipped or step % self._task.config.train.log_every == 0 or step == self._task.total_steps:
            self.train(step, metrics)
        if metrics.skipped:
            where = self._name_bad(metrics)
            numbers = f"loss {metrics.loss}, gradient norm {metrics.grad_norm}"
            self.progress.note(f"step {step:,}: {numbers} ({where}): skipped")
        if self._skipped_in_a_row == MAX_SKIPPED:
            raise TrainingDiverged(
                f"loss or gradients were not finite in the {MAX_SKIPPED} steps up to {step:,} ({where}); parameters "
                f"are still those of step {step - MAX_SKIPPED:,}: lower --optimizer.learning_rate, lengthen "
                "--optimizer.warmup_steps or lower --optimizer.clip_norm, and start again with --run NAME"
            )

    def _name_bad(self, metrics: StepMetrics) -> str:
        """Return which gradients are not finite: the name of the first, and how many others."""
        params = self._task.params
        trained = jax.eval_shape(params.init, jax.random.key(0)) if params.init else params.trainable
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
        bad = [path for path, is_bad in zip(paths, metrics.bad, strict=True) if is_bad]
        if len(bad) in (0, len(paths)):
            return "all gradients" if bad else "no gradient"
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        return f"gradient of {jax.tree_util.keystr(bad[0], simple=True, separator='/')}{others}"

    def train(self, step: int, metrics: StepMetrics) -> None:
        """Log and show the numbers of a step."""
        elapsed = time.monotonic() - self._lap_began
        steps = max(1, step - self._lap_step)
        rate = steps * self._task.tokens_per_step / max(elapsed, 1e-9)
        row = {
            "step": step,
            "split": "train",
            **self._loss(float(metrics.loss)),
            **{name: float(value) for name, value in metrics.metrics.items()},
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
        self._note_spike(step, float(metrics.loss))
        self.start_lap(step)

    def _note_spike(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        if len(self._recent) == self._recent.maxlen and loss > SPIKE * (highest := max(self._recent)):
            before = f"the last {len(self._recent)} logged were at most {highest:.3f}"
            self.progress.note(
                f"step {step:,}: the loss rose to {loss:.3f}; {before}: a bad batch, or the learning rate"
            )
        self._recent.append(loss)

    def evaluation(self, step: int, sums: EvaluationSums) -> bool:
        """Log and show an evaluation of the validation split; return whether its loss is the lowest so far."""
        loss, unit = sums.loss, self._task.unit
        row = {"step": step, "split": "val", **self._loss(loss), **self._task.figures(sums)}
        row |= {f"{unit}s": int(sums.weight_sum), "seconds": round(self.seconds(), 3)}
        if self._task.bytes_per_token:  # comparable between tokenizers, unlike the loss per token
            row["bits_per_byte"] = loss / math.log(2) / self._task.bytes_per_token
        self._add(row)
        self.progress.validation(row, self._task.score)
        best = loss < min(self.validation.values(), default=math.inf)
        self.validation[step] = _or_infinite(loss)
        self._warn_of_overfitting()
        return best

    def test(self, step: int, figures: dict[str, Any]) -> None:
        """Log what was measured on the test split, once."""
        row = {"step": step, "split": "test", **figures}
        if row not in self.folder.metrics("test"):
            self._add(row)

    def sample(self, step: int, text: str) -> None:
        """Save a sample."""
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
            title, unit = f"{self._task.config.name}: loss by step", f"nats a {self._task.unit}"
            try:
                draw_loss(self.folder.metrics(), self.folder.path / "loss.png", title, unit, self._task.score)
            except (InputError, OSError) as error:
                self._last_drawn = math.inf  # not tried again
                self.progress.note(f"warning: loss.png was not drawn: {error}")

    def summary(self) -> dict[str, Any]:
        """Return the figures of a finished run, JSON-able; losses in nats."""
        train = self.folder.metrics("train")
        last = {"step": 0, "loss": None, "tokens": 0, **(train[-1] if train else {})}  # a damaged line may lack some
        rates = [row["tokens_per_second"] for row in train if row.get("tokens_per_second") is not None]
        best = min(self.validation, key=lambda step: self.validation[step])
        return {
            "run": self._task.config.name,
            "task": self._task.config.task,
            "step": last["step"],
            "tokens": last["tokens"],
            "training_loss": last["loss"],
            "validation_loss": self.validation[max(self.validation)],
            "best_step": best,
            "best_validation_loss": self.validation[best],
            "seconds": round(self.seconds(), 1),
            "tokens_per_second": float(np.median(rates)) if rates else None,
        }

    def print_end(self, summary: dict[str, Any]) -> None:
        """Print the end of a run: its figures, its files, and what to try next."""
        path = self.folder.path
        report = self._task.report(summary["before"], summary["after"]) if "after" in summary else []
        known = {**RUN_FILES, **self._task.written}
        files = [f"  {name:<22}{what}" for name, what in known.items() if (path / name).exists()]
        commands = (*self._task.next_commands(), f"slm-jax report --run {shlex.quote(str(path))}")
        for line in (
            *report,
            f"done: {summary['step']:,} steps, {summary['tokens']:,} tokens in {format_duration(summary['seconds'])}; "
            f"lowest validation loss {summary['best_validation_loss']:.4f} at step {summary['best_step']:,}",
            f"written to {path}:",
            *files,
            "try next:",
            *(f"  {command}" for command in commands),
        ):
            self.progress.note(line)

    def _add(self, row: dict[str, Any]) -> None:
        self.folder.add_metrics(row)
        for logger in self._loggers:
            logger.metrics(row)

    def _loss(self, loss: float) -> dict[str, float]:
        perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss
        return {"loss": loss, "perplexity": perplexity} if self._task.unit == "token" else {"loss": loss}

    def _warn_of_overfitting(self) -> None:
        """Warn once when three evaluations are clearly above the lowest while the training loss falls."""
        lowest = min(self.validation.values())
        recent = [self.validation[step] for step in sorted(self.validation)[-3:]]
        if self._warned_of_overfitting or len(self.validation) < 4 or min(recent) < 1.01 * lowest:
            return
        best = min(self.validation, key=lambda step: self.validation[step])
        train = [row for row in self.folder.metrics("train") if row.get("loss") is not None]
        before = [row["loss"] for row in train if row["step"] <= best][-10:]
        if before and np.mean([row["loss"] for row in train[-10:]]) < np.mean(before):
            self._warned_of_overfitting = True
            self.progress.note(
                f"overfitting: the validation loss was lowest at step {best:,} ({self.validation[best]:.4f}) while "
                "the training loss still falls; that checkpoint is kept. More text, dropout or fewer steps help"
            )


def _or_infinite(loss: float | None) -> float:
    """Return a loss that can be compared: NaN (null in the log) becomes infinity."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


class StepProfile:
    """Profiles a range of steps (None: none), once, into ``profile`` in a run's folder."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, note: Callable[[str], None]):
        self._steps, self._folder, self._note = steps, folder / "profile", note
        self._running = self._begun = False

    def at(self, step: int, wait: Callable[[], None]) -> None:
        """Start or stop at this step; ``wait`` must block until the devices have done all steps up to it."""
        if self._steps is None:
            return
        begin, end = self._steps
        if begin <= step < end and not self._begun:  # a resumed run may start in the middle
            wait()  # keeps earlier steps out of the profile
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = self._begun = True
        elif step == end and self._running:
            wait()
            self.close()

    def close(self) -> None:
        """Write the profile, at its last step or when the run ends earlier; report if there is none."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._note(f"profile written to {self._folder}: open its perfetto_trace.json.gz at ui.perfetto.dev")
        elif self._steps and not self._begun:
            self._note(f"no profile: this start did not reach step {self._steps[0]:,} of train.profile")


@own_style()
def draw_loss(
    rows: list[dict[str, Any]], path: Path, title: str, unit: str = "nats a token", score: str | None = None
) -> None:
    """Draw training and validation loss by step into a PNG file; write nothing if no loss is finite.

    The rows are lines of ``metrics.jsonl``. The ``score``, between 0 and 1, has its own axis on the right.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, rows, "train", "loss", color=TRAINING, linewidth=0.8, label="training (one batch)")
    validation = _draw(axes, rows, "val", "loss", color=VALIDATION, marker="o", markersize=3, label="validation (all)")
    if not axes.get_lines():
        return
    if validation:
        best_step, best_loss = min(validation, key=lambda point: point[1])
        label: dict[str, Any] = {"ha": "right", "fontsize": 8, "color": VALIDATION, "textcoords": "offset points"}
        axes.annotate(f"{best_loss:.3f} at step {best_step:,}", (best_step, best_loss), xytext=(-6, 10), **label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.25)
    lines = [*axes.get_lines()]
    if score is not None and any(row["split"] == "val" and row.get(score) is not None for row in rows):
        right = axes.twinx()
        right.set_ylabel(score)
        right.set_ylim(0, 1.02)
        style = {"color": SCORE, "linestyle": "--", "marker": "s", "markersize": 3}
        _draw(right, rows, "val", score, label=f"validation {score}", **style)
        lines += right.get_lines()
    figure.legend(handles=lines, frameon=False, loc="outside lower center", ncols=len(lines), fontsize=9)
    write_png(figure, path)


def _draw(axes: "Axes", rows: list[dict[str, Any]], split: str, key: str, **style: Any) -> list[tuple[int, float]]:
    """Draw one key of one split by step, if it was logged; return the points."""
    points = [(row["step"], row[key]) for row in rows if row["split"] == split and row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
    return points
