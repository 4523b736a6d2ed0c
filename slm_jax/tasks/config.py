"""The configuration of a whole run: what every run has, and the section of each task.

The defaults are the ``tiny`` recipe, and those of fine-tuning ``classify_builtin``, so that training with no arguments
at all works.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from slm_jax.config import parse, recipe_files
from slm_jax.data.config import ClassificationConfig, DataConfig, InstructionConfig
from slm_jax.training.config import BaseRunConfig, CheckpointConfig, OptimizerConfig, SampleConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class RunConfig(BaseRunConfig):
    """A whole run.

    Attributes:
        classification: fine-tuning on labelled texts.
        instruction: fine-tuning on instructions.
    """

    task: Literal["pretraining", "classification", "instruction"] = "pretraining"
    classification: ClassificationConfig = dataclasses.field(default_factory=ClassificationConfig)
    instruction: InstructionConfig = dataclasses.field(default_factory=InstructionConfig)

    @property
    def default_run(self) -> str:
        """Name of the task's recipe whose keys are the defaults."""
        return TASKS[self.task].recipe


@dataclasses.dataclass(frozen=True)
class TaskDefaults:
    """What a task does by default.

    Attributes:
        recipe: name of the recipe with the same keys.
        source: its data.
    """

    recipe: str
    source: str


# The registry of tasks: module slm_jax.tasks.NAME and key of its section in RunConfig.
TASKS = {
    "pretraining": TaskDefaults("tiny", "builtin:python-docs"),
    "classification": TaskDefaults("classify_builtin", "builtin:prose-or-code"),
    "instruction": TaskDefaults("sft_builtin", "builtin:docstrings"),
}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """A run of fine-tuning: the same keys, with the defaults of the recipe ``classify_builtin``."""

    task: Literal["pretraining", "classification", "instruction"] = "classification"
    base: str | None = "runs/tiny"
    trainable: Literal["all", "head", "last_block", "last_n_blocks", "lora"] = "last_block"
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(source=TASKS["classification"].source))
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3, warmup_steps=20)
    )
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(steps=150, batch_size=32, eval_every=50, eval_batch_size=64)
    )
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=lambda: CheckpointConfig(every=50))
    sample: SampleConfig = dataclasses.field(default_factory=lambda: SampleConfig(temperature=0.0))

    def __post_init__(self) -> None:
        if self.data.source == TASKS["classification"].source:  # nothing else can be trained on it
            object.__setattr__(self, "data", dataclasses.replace(self.data, source=TASKS[self.task].source))
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
