"""The recipes under configs/, for the tests that read them; a token file in place of one that is not here."""

import dataclasses
from pathlib import Path

import numpy as np
import yaml

from slm_jax.config import FinetuneConfig, RunConfig, parse_args

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))


def read(name: str, *more: str) -> RunConfig:
    path = CONFIGS / f"{name}.yaml"
    task = yaml.safe_load(path.read_text()).get("task", "pretraining")
    return parse_args(["--config", str(path), *more], RunConfig if task == "pretraining" else FinetuneConfig)


def with_tokens(config: RunConfig, folder: Path) -> RunConfig:
    """Replace a recipe's token file by one of a million random ids of GPT-2's, a tenth of which validates."""
    if not config.data.source.startswith("tokens:"):
        return config
    path = folder / "tokens.bin"
    np.random.default_rng(0).integers(0, 50_257, 1_000_000).astype("<u2").tofile(path)
    data = dataclasses.replace(config.data, source=f"tokens:{path}", validation_fraction=0.1)
    return dataclasses.replace(config, data=data)
