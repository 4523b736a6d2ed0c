"""The summary of a finished run, and what is printed at its end."""

import os
import platform
import shlex
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np
import optax

from slm_jax.training.progress import ProgressLine, format_duration
from slm_jax.training.run_folder import FROZEN, RunFolder
from slm_jax.training.task import Task

RUN_FILES = {
    "config.yaml": "the run's configuration, every key",
    "metrics.jsonl": "losses, learning rate, gradient norm and speed, one JSON object a line",
    "loss.png": "the loss curves",
    "samples.md": "text sampled during training",
    "confusion.png": "confusion matrices",
    "responses-before.json": "the responses to the test instructions before training",
    "responses.json": "the responses to the test instructions after training",
    "tensorboard": "the log for TensorBoard",
    "wandb": "the log for Weights & Biases",
    "profile": "the profile of a few steps",
    "summary.json": "the figures of the whole run",
    "tokenizer": "the tokenizer",
    "template.json": "the template of the instructions",
    FROZEN: "the parameters that were not trained",
    "checkpoints": "the latest checkpoints and the best",
}


def summarize(task: Task, folder: RunFolder, validation: Mapping[int, float], seconds: float) -> dict[str, Any]:
    """Return the figures of a finished run, JSON-able; losses in nats, ``validation`` by step."""
    train = folder.metrics("train")
    last = train[-1] if train else {"step": 0, "loss": None, "tokens": 0}
    best = min(validation, key=lambda step: validation[step])
    return {
        "run": task.config.name,
        "task": task.config.task,
        "step": last["step"],
        "tokens": last["tokens"],
        "training_loss": last["loss"],
        "validation_loss": validation[max(validation)],
        "best_step": best,
        "best_validation_loss": validation[best],
        "seconds": round(seconds, 1),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in train])) if train else None,
    }


def print_end(progress: ProgressLine, folder: RunFolder, summary: dict[str, Any], task: Task) -> None:
    """Print the end of a run: its figures, its files, and what to try next."""
    if "after" in summary:
        for line in task.report(summary["before"], summary["after"]):
            progress.note(line)
    progress.note(
        f"done: {summary['step']:,} steps, {summary['tokens']:,} tokens in {format_duration(summary['seconds'])}; "
        f"lowest validation loss {summary['best_validation_loss']:.4f} at step {summary['best_step']:,}"
    )
    progress.note(f"written to {folder.path}:")
    for name, what in RUN_FILES.items():
        if (folder.path / name).exists():
            progress.note(f"  {name:<22}{what}")
    progress.note("try next:")
    for command in (*task.next_commands(), f"slm-jax report --run {shlex.quote(str(folder.path))}"):
        progress.note(f"  {command}")


def rounding_changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys in which two environments differ and that decide how numbers are rounded."""
    keys = ("device", "devices", "processes", "threads", "jax")
    return [key for key in keys if was.get(key, now[key]) != now[key]]


def environment(n_devices: int) -> dict[str, Any]:
    """Return what the numbers of a run depend on apart from its configuration."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": n_devices,
        "processes": jax.process_count(),
        "threads": len(affinity(0)) if affinity else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
    }
