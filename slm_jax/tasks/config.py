"""The configuration of a whole run: what every run has, and the section of each task.

The defaults are the ``tiny`` recipe, and those of fine-tuning ``classify_builtin``, so that training with no arguments
at all works.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from slm_jax.config import check_at_least, parse, recipe_files
from slm_jax.data.config import ClassificationConfig, DataConfig, InstructionConfig
from slm_jax.training.config import BaseRunConfig, CheckpointConfig, OptimizerConfig, SampleConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class RunConfig(BaseRunConfig):
    """A whole run.

    Attributes:
        classification: fine-tuning on labelled texts.
        instruction: fine-tuning on instructions.
    """

    classification: ClassificationConfig = dataclasses.field(default_factory=ClassificationConfig)
    instruction: InstructionConfig = dataclasses.field(default_factory=InstructionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        values = {
            "classification.max_length": self.classification.max_length,
            "instruction.max_length": self.instruction.max_length,
            "instruction.responses": self.instruction.responses,
        }
        limits = {"classification.max_length": 1, "instruction.max_length": 2, "instruction.responses": 0}
        check_at_least(values, limits)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """A run of fine-tuning: the same keys, with the defaults of the recipe ``classify_builtin``."""

    task: Literal["pretraining", "classification", "instruction"] = "classification"
    base: str | None = "runs/tiny"
    trainable: Literal["all", "head", "last_block", "last_n_blocks", "lora"] = "last_block"
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(source="builtin:prose-or-code"))
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3, warmup_steps=20)
    )
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(steps=150, batch_size=32, eval_every=50, eval_batch_size=64)
    )
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=lambda: CheckpointConfig(every=50))
    sample: SampleConfig = dataclasses.field(default_factory=lambda: SampleConfig(temperature=0.0))

    def __post_init__(self) -> None:
        if self.task == "instruction" and self.data.source == "builtin:prose-or-code":  # has texts with classes
            object.__setattr__(self, "data", dataclasses.replace(self.data, source="builtin:docstrings"))
        super().__post_init__()


def parse_args(args: Sequence[str], cls: type[RunConfig] = RunConfig) -> RunConfig:
    """Read recipe files and overrides in the order they are given; a run is named after the last recipe.

    Args:
        args: the words after the command.
        cls: whose defaults hold: RunConfig's of pretraining, or FinetuneConfig's.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range; a file that is missing or not YAML.
    """
    config = parse(cls, args, "slm-jax train" if cls is RunConfig else "slm-jax finetune")
    recipes = recipe_files(cls, args)
    if config.run is None and recipes:
        config = dataclasses.replace(config, run=recipes[-1].stem)
    return config
