"""The recipes under configs/, for the tests that read them, and the training step of a configuration."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from slm_jax.tasks.config import FinetuneConfig, RunConfig, parse_args
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.step import TrainState, make_train_step

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


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


def training_step(config: RunConfig, loss_fn, init, total_steps: int = 1000):
    """Return the step of a run, jitted as the loop does it, and what makes the state before the first from a key."""
    optimizer, schedule = make_optimizer(config.optimizer), make_schedule(config.optimizer, total_steps)
    step = make_train_step(loss_fn, optimizer, schedule, config.train.accumulate)

    def initial_state(key):
        params = init(key)
        return TrainState(jnp.int32(0), params, optimizer.init(params), key)

    return jax.jit(step, donate_argnums=0), initial_state


def initial_params(task):
    """Return what makes a task's trained parameters from a key."""
    return task.params.init or (lambda key: task.params.trainable)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
