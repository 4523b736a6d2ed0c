"""``slm-jax train``: pretrain a GPT."""

import sys
from collections.abc import Sequence

from slm_jax.commands import set_up
from slm_jax.errors import InputError
from slm_jax.tasks.config import TASKS, RunConfig, get_task, parse_args
from slm_jax.training.supervisor import needs_supervisor, report_to_supervisor, supervise


def main(args: Sequence[str]) -> int:
    options = parse_args(args)
    if TASKS[options.task].command != "train":
        raise InputError(f"task is {options.task}; expected pretraining, or use slm-jax finetune")
    return supervise("train", args, options.restarts) if needs_supervisor(options.restarts) else run(options)


def run(options: RunConfig) -> int:
    """Train or resume a run of any task; return 0, 1 if it diverged, or 128 + the signal that stopped it.

    If another process of the job is lost, this one exits with status 75.
    """
    from rich.console import Console

    from slm_jax.training.checkpoint import DamagedCheckpoint
    from slm_jax.training.loop import train
    from slm_jax.training.process import Interrupted, StopRequest, lasting_output, quiet_callbacks
    from slm_jax.training.program import out_of_memory_as_input_error
    from slm_jax.training.record import TrainingDiverged
    from slm_jax.training.resume import find_start
    from slm_jax.training.watch import joined

    command = f"slm-jax {TASKS[options.task].command}"
    report_to_supervisor()
    with lasting_output(), quiet_callbacks(), StopRequest() as stop:
        try:
            with joined(command, options.join_timeout), out_of_memory_as_input_error():
                set_up()
                damaged: dict[int, str] = {}
                tried: set[int] = set()
                while True:
                    start = find_start(options, damaged)
                    task = get_task(options.task).build(options, start, stop.check)
                    try:
                        train(options, task, start, stop, Console(quiet=not start.folder.writes))
                        return 0
                    except DamagedCheckpoint as damage:  # found on loading: use the mirror's copy, or an earlier one
                        if start.first_step in tried:
                            remedy = "delete both to resume from an earlier checkpoint"
                            raise InputError(f"{damage}, and so is the mirror's copy; {remedy}") from None
                        tried.add(start.first_step)
                        damaged[start.first_step] = str(damage)
        except Interrupted as interruption:
            print(f"{command}: stopped by {interruption}", file=sys.stderr)
            return 128 + interruption.signum
        except TrainingDiverged as diverged:
            print(f"{command}: {diverged}", file=sys.stderr)
            return 1
