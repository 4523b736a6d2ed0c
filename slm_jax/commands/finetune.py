"""``slm-jax finetune``: turn a pretrained GPT into a classifier, or teach it to follow instructions."""

import sys
from collections.abc import Sequence

from slm_jax.commands import train
from slm_jax.config import dump_config
from slm_jax.errors import InputError
from slm_jax.files import user_path
from slm_jax.tasks.config import TASKS, FinetuneConfig, RunConfig, get_task, parse_args
from slm_jax.training.supervisor import needs_supervisor, supervise


def main(args: Sequence[str]) -> int:
    options = parse_args(args, FinetuneConfig)
    if TASKS[options.task].command != "finetune":
        tasks = " or ".join(name for name, task in TASKS.items() if task.command == "finetune")
        raise InputError(f"task is {options.task}; expected {tasks}, or use slm-jax train")
    return supervise("finetune", args, options.restarts) if needs_supervisor(options.restarts) else run(options)


def run(options: RunConfig) -> int:
    first = _missing_base(options)
    if first is not None:
        get_task(options.task).check_data(options)
        print(f"{options.base} does not exist yet: pretraining the tiny model first", file=sys.stderr)
        if status := train.run(first):
            return status
    return train.run(options)


def _missing_base(options: RunConfig) -> RunConfig | None:
    """Return the run of the tiny recipe that has to be trained first; None if the base exists or is another one."""
    tiny = RunConfig(run="tiny", runs_dir=options.runs_dir)
    places = (options.folder, options.mirror_folder)
    resumes = any(place and (place / "checkpoints").exists() for place in places)
    if resumes or user_path(options.base or "") != tiny.folder or _is_in_bucket(options.mirror_url):
        return None
    config_file = tiny.folder / "config.yaml"
    begun = config_file.is_file() and config_file.read_text(encoding="utf-8") == dump_config(tiny)
    unfinished = begun and not (tiny.folder / "summary.json").exists()
    return tiny if unfinished or not tiny.folder.exists() else None


def _is_in_bucket(mirror_url: str | None) -> bool:
    if mirror_url is None:
        return False
    from slm_jax.training.mirror import BucketCopy

    return bool(BucketCopy(mirror_url).steps())
