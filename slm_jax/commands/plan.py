"""``slm-jax plan``: what a run will need of an accelerator that is not here."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Literal

import yaml

from slm_jax.config import check_at_least, parse, recipe_files
from slm_jax.errors import InputError
from slm_jax.tasks.config import FinetuneConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class Options(RunConfig):
    """Say what a run (with any keys of train or finetune) will need of a device that need not be here, and how it fits.

    Nothing is trained, downloaded or read but small files.

    Attributes:
        device: h200, h100, h100-pcie, b200, a100-80g, a100-40g, l40s, l4, v100, t4, v6e, v5e, v5p, v4, v3, v2, or cpu:
            this machine.
        devices: how many such devices share each batch.
        mfu: the share of the device's peak FLOP/s that is reached, above 0, at most 1; null: 0.4, an assumption.
            Not for cpu, whose peak is not known.
        tokens: how many are trained on, such as 10e9; null: as many as train.steps take.
        format: table, or json with bytes, FLOP/s and hours.
    """

    device: str = "cpu"
    devices: int = 1
    mfu: float | None = None
    tokens: float | None = None
    format: Literal["table", "json"] = "table"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(vars(self), {"devices": 1, "tokens": 1})
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise InputError(f"mfu is {self.mfu}; expected a number above 0 and at most 1, such as 0.4")


@dataclasses.dataclass(frozen=True)
class FinetuneOptions(FinetuneConfig, Options):
    """The same, with the defaults of finetune."""


def main(args: Sequence[str]) -> int:
    """Read the options and run; see ``slm-jax plan --help``."""
    if _finetunes(args):
        return run(parse(FinetuneOptions, args, "slm-jax plan"))
    return run(parse(Options, args, "slm-jax plan"))


def run(options: Options) -> int:
    """Plan, and print; return 0."""
    import jax
    from rich.console import Console

    from slm_jax.tools.plan.plan import make_plan
    from slm_jax.tools.plan.report import print_plan

    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here is left to those who train
    plan = make_plan(options, options.device, options.devices, options.mfu, options.tokens)
    if options.format == "json":
        print(json.dumps(dataclasses.asdict(plan), indent=2))
    else:
        print_plan(plan, Console())
    return 0


def _finetunes(args: Sequence[str]) -> bool:
    """Return whether recipes or the command line name a task of fine-tuning; what is wrong with them is told later."""
    tasks = ["pretraining"]
    for recipe in recipe_files(Options, args):
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
            tasks += [values["task"]] if isinstance(values, dict) and "task" in values else []
    for word, following in itertools.pairwise([*args, ""]):
        tasks += [following] if word == "--task" else [word[7:]] if word.startswith("--task=") else []
    return tasks[-1] in ("classification", "instruction")
