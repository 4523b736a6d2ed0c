"""The tasks, registered once, and the configuration of a whole run: what every run has, and the tasks' sections.

To add a task, write its module, and add its name, its row and its section (if it has one) here. The defaults are the
``tiny`` recipe, and those of fine-tuning ``classify_builtin``, so that training with no arguments at all works.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from slm_jax.config import Execution, parse, recipe_files
from slm_jax.data.config import ClassificationConfig, DataConfig, InstructionConfig, PreferenceConfig
from slm_jax.training.config import BaseRunConfig, CheckpointConfig, OptimizerConfig, SampleConfig, TrainConfig

if TYPE_CHECKING:
    from slm_jax.training.task import Task

TaskName = Literal["pretraining", "classification", "instruction", "preference"]


class TaskInfo(NamedTuple):
    """What is known of a task before its module is imported."""

    cls: str  # module and class in slm_jax.tasks
    recipe: str  # the recipe whose keys are the defaults
    source: str  # default of data.source
    unit: Literal["token", "text"]  # what the loss is a mean over
    use: str  # the command that uses a trained model
    command: Literal["train", "finetune"] = "finetune"  # the command that trains it


# The registry. A section of RunConfig that has the name of a task is read by this task only.
TASKS: dict[str, TaskInfo] = {
    "pretraining": TaskInfo("pretraining:Pretraining", "tiny", "builtin:python-docs", "token", "generate", "train"),
    "classification": TaskInfo(
        "classification:Classification", "classify_builtin", "builtin:prose-or-code", "text", "classify"
    ),
    "instruction": TaskInfo("instruction:Instruction", "sft_builtin", "builtin:docstrings", "token", "chat"),
    "preference": TaskInfo("preference:Preference", "dpo_builtin", "builtin:docstring-preferences", "text", "chat"),
}


def get_task(name: str) -> "type[Task]":
    """Import and return the class of a task."""
    module, _, cls = TASKS[name].cls.partition(":")
    return getattr(importlib.import_module(f"slm_jax.tasks.{module}"), cls)


@dataclasses.dataclass(frozen=True)
class RunConfig(BaseRunConfig):
    """Train a model; the defaults are those of the recipe ``tiny``.

    Attributes:
        classification: fine-tuning on labelled texts.
        instruction: fine-tuning on instructions.
        preference: fine-tuning on pairs of a chosen and a rejected response.
    """

    task: TaskName = "pretraining"
    classification: ClassificationConfig = dataclasses.field(default_factory=ClassificationConfig)
    instruction: InstructionConfig = dataclasses.field(default_factory=InstructionConfig)
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)

    @property
    def default_run(self) -> str:
        """Name of the task's recipe whose keys are the defaults."""
        return TASKS[self.task].recipe


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tune a model; the defaults are those of the recipe ``classify_builtin``."""

    task: TaskName = "classification"
    base: str | None = "runs/tiny"
    trainable: Literal["all", "head", "last_block", "last_n_blocks", "lora"] = "last_block"
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(source=TASKS["classification"].source))
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3, warmup_steps=20)
    )
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(steps=150, batch_size=32, eval_every=50, eval_batch_size=64)
    )
    checkpoint: Execution[CheckpointConfig] = dataclasses.field(default_factory=lambda: CheckpointConfig(every=50))
    sample: Execution[SampleConfig] = dataclasses.field(default_factory=lambda: SampleConfig(temperature=0.0))

    def __post_init__(self) -> None:
        if self.data.source == TASKS["classification"].source:  # nothing else can be trained on it
            object.__setattr__(self, "data", dataclasses.replace(self.data, source=TASKS[self.task].source))
        super().__post_init__()


def parse_args(args: Sequence[str], cls: type[RunConfig] = RunConfig) -> RunConfig:
    """Read the words after a command as :func:`slm_jax.config.parse` does; a run is named after the last recipe."""
    config = parse(cls, args, "slm-jax train" if cls is RunConfig else "slm-jax finetune")
    recipes = recipe_files(cls, args)
    if config.run is None and recipes:
        config = dataclasses.replace(config, run=recipes[-1].stem)
    return config
