"""Loggers for the lines of ``metrics.jsonl``: TensorBoard and Weights & Biases; both packages are optional.

Metrics are named by split and key: ``train/loss``, ``val/perplexity``.
"""

import html
import importlib.util
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.config import to_dict
from slm_jax.errors import InputError
from slm_jax.training.config import BaseRunConfig, LoggingConfig

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by extra and configuration key
WANDB_ID = "wandb-id.txt"  # the run's id at Weights & Biases, for a resume


def check_loggers(config: LoggingConfig) -> None:
    """Refuse loggers that are not installed."""
    asked = {"tensorboard": config.tensorboard, "wandb": config.wandb != "disabled"}
    for key, package in PACKAGES.items():
        if asked[key] and importlib.util.find_spec(package) is None:
            raise InputError(f'logging.{key} needs the package {package}; pip install -e ".[{key}]", or leave it out')


class Logger(NamedTuple):
    """Another destination for what is logged."""

    metrics: Callable[[dict[str, Any]], None]  # takes a line of metrics.jsonl
    text: Callable[[str, str, int], None]  # takes a name, a text and a step
    close: Callable[[], None]


def open_loggers(config: BaseRunConfig, folder: Path, step: int) -> list[Logger]:
    """Open the requested loggers; those that can drop what they logged after ``step``."""
    tensorboard = [_tensorboard(folder / "tensorboard", step)] if config.logging.tensorboard else []
    return [*tensorboard, *([_wandb(config, folder)] if config.logging.wandb != "disabled" else [])]


def _tensorboard(folder: Path, step: int) -> Logger:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)  # hides what was logged after the step

    def metrics(row: dict[str, Any]) -> None:
        for name, value in figures(row).items():
            writer.add_scalar(name, value, row["step"])

    def text(name: str, text: str, step: int) -> None:
        writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)  # Markdown's code

    return Logger(metrics, text, writer.close)


def _wandb(config: BaseRunConfig, folder: Path) -> Logger:
    """Log to Weights & Biases, or, offline, to files that ``wandb sync`` sends later.

    A resumed run continues the same run there; repeated steps appear twice, because nothing can be deleted.
    """
    import wandb

    id_file = folder / WANDB_ID
    if not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    try:
        run: Any = wandb.init(
            project=config.logging.wandb_project,
            name=config.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            mode=config.logging.wandb,
            config=to_dict(config),
            settings=wandb.Settings(silent=True, init_timeout=30),
        )
    except wandb.Error as error:  # no key, no network, no such project
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"logging.wandb: {reason}; run wandb login, or use --logging.wandb offline") from None
    run.define_metric("*", step_metric="step")  # wandb's own steps can only grow, but a resume goes back

    def text(name: str, text: str, step: int) -> None:
        run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False), "step": step})

    return Logger(lambda row: run.log({**figures(row), "step": row["step"]}), text, run.finish)


def figures(row: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a line of ``metrics.jsonl`` by their names, such as ``train/loss``."""
    return {
        f"{row['split']}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
