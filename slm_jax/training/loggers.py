"""Other places for the lines of ``metrics.jsonl``: TensorBoard and Weights & Biases, under the same names.

A figure's name there is its split and its key: ``train/loss``, ``val/perplexity``. Both packages are optional.
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
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by their extra, which is their key, too
WANDB_ID = "wandb-id.txt"  # the run's name at Weights & Biases, which a run that goes on keeps


def check_loggers(config: LoggingConfig) -> None:
    """Refuse what is asked for and not installed.

    Raises:
        InputError: naming the package and how to get it.
    """
    asked = {"tensorboard": config.tensorboard, "wandb": config.wandb != "disabled"}
    for key, package in PACKAGES.items():
        if asked[key] and importlib.util.find_spec(package) is None:
            raise InputError(
                f'logging.{key} needs the package {package}, which is not installed; pip install -e ".[{key}]", or '
                f"leave logging.{key} out"
            )


class TensorBoardLogger:
    """Writes TensorBoard's event files; what they have after ``step`` is hidden."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def metrics(self, row: dict[str, Any]) -> None:
        """Take a line of ``metrics.jsonl``."""
        for name, value in figures(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def text(self, name: str, text: str, step: int) -> None:
        """Take a text, as Markdown shows it unchanged."""
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self) -> None:
        """Write what is still to be written."""
        self._writer.close()


class WandbLogger:
    """Sends to Weights & Biases, or, offline, writes what ``wandb sync`` sends later.

    A run that goes on is the same run there; steps that were done again are there twice, as nothing can be taken back.

    Raises:
        InputError: Weights & Biases refuses: no key, no network, no such project.
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
                f"logging.wandb is {config.logging.wandb}: Weights & Biases says: {reason:.300}; run wandb login, or "
                "use --logging.wandb offline"
            ) from None
        self._run.define_metric("*", step_metric="step")  # its own steps may only grow, and a resume goes back

    def metrics(self, row: dict[str, Any]) -> None:
        """Take a line of ``metrics.jsonl``."""
        self._run.log({**figures(row), "step": row["step"]})

    def text(self, name: str, text: str, step: int) -> None:
        """Take a text."""
        import html

        import wandb

        self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False), "step": step})

    def close(self) -> None:
        """Write what is still to be written."""
        self._run.finish()


Logger = TensorBoardLogger | WandbLogger


def open_loggers(config: BaseRunConfig, folder: Path, step: int) -> list[Logger]:
    """Open the loggers that the run asks for; what they have after ``step`` is dropped where they can.

    Raises:
        InputError: a logger that cannot be opened.
    """
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
