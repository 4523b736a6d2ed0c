"""``slm-jax train``: pretrain a GPT."""

import importlib
import sys
from collections.abc import Sequence

from slm_jax.commands import set_up
from slm_jax.errors import InputError
from slm_jax.tasks.config import RunConfig, parse_args


def main(args: Sequence[str]) -> int:
    """Read the options and run; see ``slm-jax train --help``."""
    options = parse_args(args)
    if options.task != "pretraining":
        raise InputError(f"task is {options.task}; expected pretraining here: the others are slm-jax finetune's")
    return run(options)


def run(options: RunConfig) -> int:
    """Train, or go on with a run, of any task; return 0, 1 where it diverged, or 128 + the signal that stopped it."""
    from rich.console import Console

    from slm_jax.training.interrupt import Interrupted, StopRequest
    from slm_jax.training.loop import TrainingDiverged, train
    from slm_jax.training.memory import out_of_memory_as_input_error
    from slm_jax.training.sharding import initialize_distributed
    from slm_jax.training.start import find_start

    command = "slm-jax train" if options.task == "pretraining" else "slm-jax finetune"
    with StopRequest() as stop, out_of_memory_as_input_error():
        try:
            set_up()
            initialize_distributed()
            start = find_start(options)
            task = importlib.import_module(f"slm_jax.tasks.{options.task}").build(options, start, stop.check)
            console = Console(quiet=not start.folder.writes)
            train(options, task, start, stop, console)
        except Interrupted as interruption:
            print(f"{command}: stopped by {interruption}", file=sys.stderr)
            return 128 + interruption.signum
        except TrainingDiverged as diverged:
            print(f"{command}: {diverged}", file=sys.stderr)
            return 1
    return 0
