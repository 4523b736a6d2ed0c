"""Look at a run's folder: whether it is whole, how far it is, how it went, and what can be done next."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from slm_jax.errors import InputError
from slm_jax.runs import read_frozen
from slm_jax.tasks.config import RunConfig, parse_args
from slm_jax.tools.doctor.machine import Finding, folder_size, guarded, start_error
from slm_jax.training.checkpoint import CHECKSUMS, best_step, find_damage, read_metadata, saved_steps
from slm_jax.training.progress import format_bytes, format_duration
from slm_jax.training.run_folder import RunFolder
from slm_jax.training.summary import environment, rounding_changes


def examine_run(run: RunFolder) -> Iterator[Finding]:
    """Yield what each check of a run finds; every file of every checkpoint is read."""
    checks: dict[str, Callable[[RunFolder], list[Finding]]] = {
        "config": check_config,
        "checkpoints": check_checkpoints,
        "log": check_log,
        "machine": check_machine,
        "mirror": check_mirror,
        "size": check_size,
        "next": check_next,
    }
    for name, check in checks.items():
        yield from guarded(name, functools.partial(check, run))


def check_config(run: RunFolder) -> list[Finding]:
    """Read the configuration."""
    if not (run.path / "config.yaml").is_file():
        text = "no config.yaml: weights that were imported, which can be used and be a --base, but not be gone on with"
        return [Finding("note", "config", text)]
    try:
        config = _config(run)
    except InputError as error:
        text = f"{error}; the checkpoints can still be used: slm-jax generate --run {run.path}"
        return [Finding("problem", "config", text)]
    text = f"{config.task} on {config.data.source}"
    if config.base is not None:
        text += f", from {config.base}, trainable {config.trainable}"
    return [Finding("ok", "config", text)]


def check_checkpoints(run: RunFolder) -> list[Finding]:
    """Compare every checkpoint with its checksums."""
    steps = saved_steps(run.checkpoints)
    if not steps:
        return [Finding("note", "checkpoints", "none yet; they are saved every checkpoint.every steps")]
    found = []
    damage = {step: _damage(run, step) for step in steps}
    whole = [step for step in steps if not damage[step]]
    best = best_step(run.checkpoints) if whole == steps else None
    for step in steps:
        if damage[step]:
            text = f"step {step:,}: {damage[step]}; delete {run.checkpoints / str(step)}, the others are not affected"
            found.append(Finding("problem", "checkpoints", text))
            continue
        loss = read_metadata(run.checkpoints, step)["validation_loss"]
        marks = [mark for mark, marked in (("the latest", steps[-1]), ("the best", best)) if marked == step]
        parts = [f"step {step:,}", *([f"validation loss {loss:.4f}"] if loss is not None else []), *marks]
        if (run.checkpoints / str(step) / CHECKSUMS).is_file():
            found.append(Finding("ok", "checkpoints", f"{', '.join(parts)}: whole, as its SHA-256 says"))
        else:
            text = f"{', '.join(parts)}: complete, but saved without checksums, as the process was ended in that moment"
            found.append(Finding("note", "checkpoints", text))
    if not whole:
        text = "every checkpoint is damaged: copy the run from its mirror or a backup, or start anew with --run NAME"
        found.append(Finding("problem", "checkpoints", text))
    else:
        found += _check_frozen(run, whole[-1])
    return found + _check_leftovers(run)


def _damage(run: RunFolder, step: int) -> str | None:
    damage = find_damage(run.checkpoints / str(step))
    if damage is None:
        try:
            read_metadata(run.checkpoints, step)
        except InputError as error:
            return str(error)
    return damage


def _check_frozen(run: RunFolder, step: int) -> list[Finding]:
    metadata = read_metadata(run.checkpoints, step)
    if metadata.get("trainable", "all") == "all":
        return []
    try:
        read_frozen(run.path, metadata)
    except InputError as error:
        return [Finding("problem", "checkpoints", f"what was not trained: {error}")]
    return [Finding("ok", "checkpoints", "frozen.safetensors, what was not trained: whole")]


def _check_leftovers(run: RunFolder) -> list[Finding]:
    """Find folders that are no checkpoints: damaged ones that were set aside, and unfinished ones."""
    others = [path for path in run.checkpoints.iterdir() if path.is_dir() and not path.name.isdecimal()]
    if not others:
        return []
    size = format_bytes(sum(map(folder_size, others)))
    names = ", ".join(path.name for path in others[:3])
    text = f"{len(others)} set aside or unfinished ({names}), {size}: may be deleted while nothing trains the run"
    return [Finding("note", "checkpoints", text)]


def check_log(run: RunFolder) -> list[Finding]:
    """Read the log: how far it goes, and what went wrong on the way."""
    rows = run.metrics()
    if not rows:
        return [Finding("note", "log", "empty")]
    found = []
    n_lines = len(run.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines())
    if n_lines > len(rows):
        text = f"metrics.jsonl is damaged in line {len(rows) + 1} of {n_lines}; what follows is not used"
        found.append(Finding("problem", "log", f"{text}, and is dropped when the run goes on"))
    last = rows[-1]
    text = f"{len(rows):,} lines up to step {last['step']:,}"
    train, validation = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    if train:
        text += f", training loss {_number(train[-1])}"
    if validation:
        lowest = min(validation, key=lambda row: math.inf if row.get("loss") is None else row["loss"])
        text += f", validation loss {_number(validation[-1])} (lowest {_number(lowest)} at step {lowest['step']:,})"
    if "seconds" in last:
        text += f", {format_duration(last['seconds'])} in all"
    found.append(Finding("ok", "log", text))
    lost = [row["step"] for row in train if row.get("loss") is None or row.get("skipped")]
    if lost:
        shown = ", ".join(f"{step:,}" for step in lost[:5]) + (" …" if len(lost) > 5 else "")
        text = f"loss or gradients were not finite in {len(lost)} logged steps, which were skipped: {shown}"
        advice = "if there are more, lower --optimizer.learning_rate or lengthen --optimizer.warmup_steps in a new run"
        found.append(Finding("note", "log", f"{text}; {advice}"))
    steps = saved_steps(run.checkpoints)
    if steps and last["step"] > steps[-1]:
        text = f"it goes on for {last['step'] - steps[-1]:,} steps after the latest checkpoint; they are done again"
        found.append(Finding("note", "log", text))
    return found


def _number(row: dict[str, Any]) -> str:
    return "not finite" if row.get("loss") is None else f"{row['loss']:.4f}"


def check_machine(run: RunFolder) -> list[Finding]:
    """Compare this machine with that of the latest checkpoint."""
    metadata = _latest_metadata(run)
    if metadata is None or "environment" not in metadata or start_error():
        return []
    was, now = metadata["environment"], environment(jax.device_count())
    versions = ", ".join(f"{name} {was[name]}" for name in ("jax", "flax", "python") if name in was)
    trained = f"trained on {was.get('devices', '?')} × {was.get('device', '?')} with {versions}"
    changed = rounding_changes(was, now)
    if not changed:
        text = f"{trained}, as here: going on is bit for bit the unbroken run"
        if jax.default_backend() == "gpu":  # whose kernels add in whatever order threads arrive
            text += ", but for what kernels round differently from run to run"
        return [Finding("ok", "machine", text)]
    here = ", ".join(f"{key} {now[key]} (was {was[key]})" for key in changed)
    text = f"{trained}; here {here}: it goes on with the same data in the same order, but not bit for bit"
    return [Finding("note", "machine", text)]


def check_mirror(run: RunFolder) -> list[Finding]:
    """Compare the mirror's checkpoints with the run's."""
    config = _config(run) if (run.path / "config.yaml").is_file() else None
    if config is None or config.mirror_folder is None:
        return []
    mirror = RunFolder(config.mirror_folder)
    if mirror.path.resolve() == run.path.resolve():
        return [Finding("ok", "mirror", "this is the mirror; the same --run and --checkpoint.mirror go on from it")]
    if not mirror.path.is_dir():
        text = f"{mirror.path} is not there; mount it: training goes on without, but the run is on this disk only"
        return [Finding("problem", "mirror", text)]
    here, there = saved_steps(run.checkpoints), saved_steps(mirror.checkpoints)
    for step in there:
        if damage := _damage(mirror, step):
            remedy = "the next start copies it again" if step in here else "delete that checkpoint there"
            return [Finding("problem", "mirror", f"{mirror.path}: step {step:,}: {damage}; {remedy}")]
    text = f"{mirror.path} has {', '.join(f'step {step:,}' for step in there) or 'no checkpoint'}"
    if here and (not there or there[-1] < here[-1]):
        return [Finding("note", "mirror", f"{text}, not the latest, {here[-1]:,}; the next start copies it")]
    return [Finding("ok", "mirror", f"{text}, each whole")]


def check_size(run: RunFolder) -> list[Finding]:
    """Say how much of the disk the run takes."""
    whole, checkpoints = folder_size(run.path), folder_size(run.checkpoints)
    text = f"{format_bytes(whole)} in {run.path}, of which checkpoints {format_bytes(checkpoints)}"
    return [Finding("ok", "size", text)]


def check_next(run: RunFolder) -> list[Finding]:
    """Say what can be done with the run."""
    if not (run.path / "config.yaml").is_file():
        return [Finding("ok", "next", f"slm-jax generate --run {run.path}")]
    if run.is_locked():
        return [Finding("note", "next", "it is being trained by another process now")]
    config = _config(run)
    command = "slm-jax train" if config.task == "pretraining" else "slm-jax finetune"
    go_on = f"{command} --config {run.path / 'config.yaml'}"
    if config.folder.resolve() != run.path.resolve():
        go_on += f" --runs_dir {run.path.parent} --run {run.path.name}"
    summary, steps = run.read_json("summary.json"), saved_steps(run.checkpoints)
    if isinstance(summary, dict) and steps and summary.get("step") == steps[-1]:
        use = {"pretraining": "generate", "classification": "classify", "instruction": "chat"}[config.task]
        text = f"done, {steps[-1]:,} steps: slm-jax {use} --run {run.path}; for more: {go_on} --train.steps N"
        return [Finding("ok", "next", text)]
    of = f" of {config.train.steps:,}" if config.train.steps else ""
    return [Finding("ok", "next", f"at step {steps[-1] if steps else 0:,}{of}; to go on: {go_on}")]


def _config(run: RunFolder) -> RunConfig:
    return parse_args(["--config", str(run.path / "config.yaml")])


def _latest_metadata(run: RunFolder) -> dict[str, Any] | None:
    for step in reversed(saved_steps(run.checkpoints)):
        with contextlib.suppress(InputError):
            return read_metadata(run.checkpoints, step)
    return None
