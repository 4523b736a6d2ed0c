"""Loggers for the lines of ``metrics.jsonl``: TensorBoard and Weights & Biases; both packages are optional.

A figure is named by its split and its key: ``train/loss``, ``val/perplexity``.
"""

import importlib.util
import math
import uuid
from pathlib import Path
from typing import Any

from slm_jax.config import to_dict
from slm_jax.errors import InputError
from slm_jax.training.config import BaseRunConfig, LoggingConfig

TENSORBOARD = "tensorboard"  # TensorBoard's folder in the run's
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by extra and configuration key
WANDB_ID = "wandb-id.txt"  # the run's id at Weights & Biases, for a resume


def check_loggers(config: LoggingConfig) -> None:
    """Refuse loggers that are not installed."""
    asked = {"tensorboard": config.tensorboard, "wandb": config.wandb != "disabled"}
    for key, package in PACKAGES.items():
        if asked[key] and importlib.util.find_spec(package) is None:
            raise InputError(
                f'logging.{key} needs the package {package}, which is not installed; pip install -e ".[{key}]", or '
                f"leave logging.{key} out"
            )


class TensorBoardLogger:
    """Writes TensorBoard's event files; hides what they have after ``step``."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def metrics(self, row: dict[str, Any]) -> None:
        """Log a line of ``metrics.jsonl``."""
        for name, value in figures(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text, indented so that Markdown shows it unchanged."""
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbLogger:
    """Sends to Weights & Biases, or, offline, writes what ``wandb sync`` sends later.

    A resumed run is the same run there; repeated steps appear twice, as nothing can be taken back.
    """

    def __init__(self, config: BaseRunConfig, folder: Path):
        import wandb

        id_file = folder / WANDB_ID
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        try:
            self._run: Any = wandb.init(
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
            reason = " ".join(str(error).split())
            raise InputError(
                f"logging.wandb is {config.logging.wandb}: Weights & Biases: {reason:.300}; run wandb login, or "
                "use --logging.wandb offline"
            ) from None
        self._run.define_metric("*", step_metric="step")  # its own steps may only grow, and a resume goes back

    def metrics(self, row: dict[str, Any]) -> None:
        """Log a line of ``metrics.jsonl``."""
        self._run.log({**figures(row), "step": row["step"]})

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text."""
        import html

        import wandb

        self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False), "step": step})

    def close(self) -> None:
        """Flush and close."""
        self._run.finish()


Logger = TensorBoardLogger | WandbLogger


def open_loggers(config: BaseRunConfig, folder: Path, step: int) -> list[Logger]:
    """Open the requested loggers; where they can, they drop what they have after ``step``."""
    loggers: list[Logger] = []
    if config.logging.tensorboard:
        loggers.append(TensorBoardLogger(folder / TENSORBOARD, step))
    if config.logging.wandb != "disabled":
        loggers.append(WandbLogger(config, folder))
    return loggers


def figures(row: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a line of ``metrics.jsonl`` by their names, such as ``train/loss``."""
    return {
        f"{row['split']}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
